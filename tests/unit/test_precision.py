"""What `auto` precision is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from heliostat import hardware
from heliostat.models.precision import computes_in_bfloat16

CPU = torch.device("cpu")


def test_auto_is_bfloat16_where_the_processor_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line = re.search(r"^(?:flags|Features).*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert line is not None
    own = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line[0].split()))
    assert computes_in_bfloat16("auto", CPU) == own
    for flags in ({"avx2", "avx512_bf16"}, {"avx2", "f16c"}, set[str]()):
        monkeypatch.setattr(hardware, "_processor_flags", lambda flags=flags: flags)
        assert computes_in_bfloat16("auto", CPU) == ("avx512_bf16" in flags)
        assert computes_in_bfloat16("bfloat16", CPU)
        assert not computes_in_bfloat16("float32", CPU)
