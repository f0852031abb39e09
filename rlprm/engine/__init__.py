"""Third-party engines behind the project's roles; nothing here knows Ray."""
