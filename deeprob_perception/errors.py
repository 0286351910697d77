# SPDX-License-Identifier: Apache-2.0
"""The errors this package raises on purpose. Each message names the file, topic or value, and what to do next."""


class PerceptionError(Exception):
    """Base of every error that a user can mend; `deeprob` prints it as one line, nodes log it and stay up."""


class MessageError(PerceptionError):
    """A serialised message that does not fit its type."""


class ImageError(MessageError):
    """An image message that cannot be decoded: unknown encoding, wrong size or step, corrupt stream."""


class BagError(PerceptionError):
    """A bag that cannot be opened, is damaged, or holds nothing to process."""


class ModelError(PerceptionError):
    """A model file, checkpoint or model name that is missing, corrupt or of another kind."""


class EngineError(PerceptionError):
    """A back end that is not installed, or that failed to load or run a model."""


class DataError(PerceptionError):
    """A data set folder that is missing, incomplete or inconsistent."""


class RobotError(PerceptionError):
    """A robot description that is no tree of joints, is hostile, or lacks what is asked of it."""


class SeedError(PerceptionError):
    """A point or mask to track that does not fit the image, or is empty."""


class OrderError(PerceptionError):
    """A frame that is older than the one before it."""


class TargetError(PerceptionError):
    """A frame that gives no goal: the class is not in view, no depth, no calibration, no camera pose."""


def describe(error: Exception) -> str:
    """Return what a user is told of an error: all of one that was raised on purpose, type and first line of another."""
    if isinstance(error, PerceptionError):
        return str(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
