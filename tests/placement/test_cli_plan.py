"""`ktlab plan` from the command line."""

import json
from pathlib import Path

import pytest

from ktlab.checkpoint.published import published_model
from ktlab.cli import main
from ktlab.placement import Placement


def test_text_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "deepseek-v2-lite", "--format", "q4_k_m", "--vram", "8GB"]
    assert main([*arguments, "--ram", "64GB"]) == 0
    assert "the largest context that fits" in capsys.readouterr().out
    assert main([*arguments, "--ram", "4GB"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_plan_with_a_gpu_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "deepseek-v3", "--format", "q4_k_m", "--ram", "400GB", "--vram", "24GB"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (head,) = (line for line in lines if line.startswith("  component"))
    rows = lines[lines.index(head) + 1 :][:9]
    assert head.endswith("FLOP/byte") and {len(row) for row in rows} == {len(head)}
    assert any("made anew: attention as int4_group128+bf16" in line for line in lines)


def test_published_speeds_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "  deepseek-v3, 2x6454s+4090d, llama.cpp" in lines


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--machine", "this", "--context", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 64 and found["ledgers"][0]["device"] == "cpu"


def test_a_bad_size_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--ram", "lots"]) == 2
    assert capsys.readouterr().err.startswith("ktlab: ram='lots': expected bytes")


def test_a_placement_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = published_model("deepseek-v2-lite").config
    file = tmp_path / "p.yaml"
    file.write_text(Placement.everywhere(config, "cpu").put("shared", "cuda:0").to_yaml())
    asked = ["plan", "deepseek-v2-lite", "--format", "q4_k_m", "--placement", str(file)]
    assert main([*asked, "--vram", "4GB"]) == 0
    assert "cuda:0 needs" in capsys.readouterr().out


def test_a_rule_file_is_no_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("- match: {name: experts}\n  replace: {class: default}\n")
    for command in ("plan", "predict"):
        assert main([command, "deepseek-v2-lite", "--placement", str(file)]) == 2
        said = capsys.readouterr().err
        assert "rules.yaml: a rule file, not a placement; give it to ktlab plan as --rules" in said
    file.write_text("- 17\n")
    assert main(["plan", "deepseek-v2-lite", "--placement", str(file)]) == 2
    assert "expected model, places; found [17]" in capsys.readouterr().err
