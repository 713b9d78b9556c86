"""What torch's errors of a device say: that there is no room, or that it failed."""

from __future__ import annotations

import pytest
import torch

from malmend.errors import is_full_device, is_of_device, is_out_of_memory
from malmend.models.forms import Unrun, tried

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
FAILED = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nMore."),
    torch.AcceleratorError("HIP error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnPotrf`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
HERE = [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")]
OF_MODEL = [RuntimeError("shapes differ"), ValueError("out of memory"), IndexError("CUDA error")]


def named(error):
    return str(error).split("\n")[0][:50] or type(error).__name__


@pytest.mark.parametrize("error", FULL, ids=named)
def test_a_device_without_room(error):
    assert is_out_of_memory(error)
    assert is_full_device(error)


@pytest.mark.parametrize("error", FAILED, ids=named)
def test_a_device_that_failed(error):
    assert is_of_device(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", HERE, ids=named)
def test_memory_without_room(error):
    assert is_out_of_memory(error)
    assert not is_full_device(error)


@pytest.mark.parametrize("error", [*FULL, *FAILED, *HERE], ids=named)
def test_what_says_nothing_of_a_model_is_raised(error):
    """It was taken for a model that cannot be run: run another way without a word, or refused."""
    with pytest.raises(type(error)) as found, tried():
        raise error
    assert found.value is error


@pytest.mark.parametrize("error", OF_MODEL, ids=named)
def test_what_is_the_models_own(error):
    assert not any(says(error) for says in (is_out_of_memory, is_full_device, is_of_device))
    with pytest.raises(Unrun), tried():
        raise error
