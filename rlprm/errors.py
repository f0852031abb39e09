"""The errors a user can act on.

Every message says what was found, what was expected and what to do. The classes add no
constructor of their own, so they pickle unchanged through Ray.

>>> import pickle
>>> pickle.loads(pickle.dumps(ConfigError("steps is 0; expected at least 1")))
ConfigError('steps is 0; expected at least 1')
"""


class RlprmError(Exception):
    """Root of every error that rlprm raises on purpose."""


class ConfigError(RlprmError, ValueError):
    """A configuration that cannot be run: raised before any model is loaded."""


class DataError(RlprmError, ValueError):
    """A data file or row that cannot be used; the message names the file and line."""


class AlignmentError(RlprmError, ValueError):
    """Two per-token quantities do not describe the same tokens."""


class NoLearningSignal(RlprmError, RuntimeError):
    """Sampling ended its bounded rounds without enough prompts that carry signal."""


class StaleWeights(RlprmError, RuntimeError):
    """An engine holds other weights than the learner published (version, names or digest)."""


class NonFinite(RlprmError, FloatingPointError):
    """A NaN or infinity reached a loss or gradient; the message names the tensor."""


class WorkerLost(RlprmError, RuntimeError):
    """A Ray actor died, became unreachable or did not answer in time; the message names it."""


class CheckpointError(RlprmError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class AlarmRaised(RlprmError, RuntimeError):
    """An alarm whose action is `stop` was raised: the run has ended, with metrics and checkpoint written."""


class Stopped(RlprmError, RuntimeError):
    """The run was asked to end: it has finished its step, saved and ended."""


class VerifierError(RlprmError, RuntimeError):
    """Too many verdicts failed, or a canary with a known answer was judged wrongly."""
