"""Ray actors, thin: unpack, call an engine, pack. No maths here."""
