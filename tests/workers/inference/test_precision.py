"""The choice of number format, and the environment torch starts in."""

import pytest
import torch

from job_store.settings import Settings
from workers.inference.environment import available_cores, chosen_threads, prepare_environment
from workers.inference.precision import choose_precision, stored_dtype


@pytest.mark.parametrize(
    ("stored", "device", "flags", "wanted"),
    [
        (torch.bfloat16, "cpu", {"avx2", "avx512_bf16"}, torch.bfloat16),
        (torch.bfloat16, "cpu", {"amx_bf16"}, torch.bfloat16),
        (torch.bfloat16, "cpu", {"avx2"}, torch.float32),
        (torch.float16, "cpu", {"avx512_bf16"}, torch.float32),
        (torch.float32, "cpu", set(), torch.float32),
        (torch.float64, "cpu", set(), torch.float32),
        (torch.float16, "cuda", set(), torch.float16),
        (torch.bfloat16, "cuda", set(), torch.bfloat16),
    ],
)
def test_as_stored_where_the_hardware_is_quick_at_it(stored, device, flags, wanted):
    precision = choose_precision(stored, device, frozenset(flags))
    assert precision.dtype is wanted
    assert precision.reason
    assert precision.name == str(wanted).split(".")[1]


def test_the_stored_format_is_that_of_most_float_parameters():
    assert stored_dtype({"BF16": 10, "F32": 3, "I64": 99}) is torch.bfloat16
    assert stored_dtype({}) is torch.float32


def test_the_environment_is_passive_and_offline_and_keeps_what_the_operator_set():
    environment = {"OMP_WAIT_POLICY": "active", "HF_HUB_OFFLINE": "0"}
    prepare_environment(Settings(threads=3), environment)
    assert environment["OMP_WAIT_POLICY"] == "active"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    fresh = {}
    prepare_environment(Settings(threads=0), fresh)
    assert fresh["OMP_WAIT_POLICY"] == "passive"
    assert fresh["OMP_NUM_THREADS"] == str(available_cores())
    assert chosen_threads(Settings(threads=0)) == available_cores()
