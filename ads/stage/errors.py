"""Errors that a user can mend, and one line on those of others."""

# Said of memory that has run out by what raises a plain RuntimeError: CPU allocators; CUDA itself and its
# libraries, where others fill the GPU; torch's allocator on a part of a GPU (MIG), which fails to tell why.
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its first allocation
    "CUDNN_STATUS_ALLOC_FAILED",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
)


class UserError(ValueError):
    """What a user can mend: one line with the value and the remedy. Scripts print it and exit with 2."""


class MissingInputError(UserError, FileNotFoundError):
    """A file, folder or model that is not there."""


class NotMadeError(MissingInputError):
    """What a stage reads and another stage is still to make."""


class NoRowsError(Exception):
    """A stage that is done and has made no row: no error, but nothing for later stages. Exit code 4."""


def reason(error: Exception) -> str:
    """One line on an error that a library raised: its text, and its type where that says more."""
    text = " ".join(str(error).split())[:300]
    is_plain = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return text if is_plain else f"{type(error).__name__}: {text}"
