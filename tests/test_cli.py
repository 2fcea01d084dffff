"""The command line: what it prints, where, and how it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ktlab
from ktlab import cli
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.checkpoint.writer import write_gguf
from ktlab.errors import SettingError
from ktlab.routing.rules import RelativeThreshold


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    checkpoint = synthesize(TINY_TEST_CONFIG, seed=0)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    path = tmp_path_factory.mktemp("cli") / "model.gguf"
    tokenizer = byte_tokenizer(TINY_TEST_CONFIG.vocab_size)
    return str(write_gguf(path, TINY_TEST_CONFIG, tensors, tokenizer))


def test_the_command_line_starts_without_torch() -> None:
    """--help is there at once: what a command needs is imported when it runs."""
    code = "import sys, ktlab.cli; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(ktlab.__file__).parents[1]).returncode
        == 0
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("Grüße from a small text. " * 40, encoding="utf-8")
    return str(path)


def test_info(gguf, capsys):
    assert cli.main(["info", gguf]) == 0
    out = capsys.readouterr().out
    assert "52 tensors, f32" in " ".join(out.split()) and "weights read" in out
    assert re.search(r"^  kv_lora_rank +32$", out, re.M) and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "experts"),
    [(["q8_0"], "q8_0"), (["*_exps*=q5_0", "*=q8_0"], "q5_0")],
)
def test_floats_are_quantized_while_loading(gguf, capsys, words, experts):
    for command in (["info"], ["generate", "--prompt", "Hello", "--max-new-tokens", "2"]):
        assert cli.main([*command, gguf, "--quantize", *words]) == 0
    assert f"experts {experts}" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["info", "tiny", "--quantize", "q4_0"]) == 2
    assert "nothing to quantize" in capsys.readouterr().err
    assert cli.main(["info", gguf, "--quantize", "*=q8_0", "q5_0"]) == 2
    assert "found 'q5_0'" in capsys.readouterr().err


def test_every_command_that_runs_a_model_can_quantize_it(capsys):
    for command in (["info"], ["generate"], ["compare"], ["chat"], ["eval"], ["bench", "model"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert "--quantize" in capsys.readouterr().out, command


def test_generate_streams_what_the_library_generates(gguf, capsys):
    command = ["generate", gguf, "--prompt", "Hello", "--top-k", "2", "--max-new-tokens", "8"]
    assert cli.main(command) == 0
    model = ktlab.load(gguf)
    with model.override(top_k=2):
        expected = model.generate("Hello", max_new_tokens=8)
    assert capsys.readouterr().out == f"Hello{expected.text}\n"
    sampled = [*command, "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    outputs = []
    for seed in ("1", "1", "2"):
        assert cli.main([*sampled, seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_compare(gguf, text, capsys):
    command = ["compare", gguf, "--a", "top_k=4", "--b", "top_k=2", "attention=naive",
               "--text", text, "--no-speed", "--max-tokens", "200"]  # fmt: skip
    assert cli.main(command) == 0
    plain = capsys.readouterr()
    assert "KL divergence, mean" in plain.out and "top_k=2, attention=naive" in plain.out
    assert plain.err == ""
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["label_b"] == "top_k=2, attention=naive" and found["speed"] is None
    assert found["quality"]["tokens"] == 200 and found["b"]["attention"] == "naive"


def test_compare_on_standard_input(gguf, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("some text to read " * 5))
    assert cli.main(["compare", gguf, "--b", "top_k=1", "--text", "-", "--no-speed"]) == 0
    assert "against a: as loaded" in capsys.readouterr().out


def test_trace(gguf, text, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert cli.main(["trace", gguf, "--text", text, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert str(out) in printed.err
    trace = ktlab.Trace.load(out)
    # Longer than the context of 512: several pieces, one trace.
    assert len(trace) == len(ktlab.load(gguf).tokenizer.encode(Path(text).read_text("utf-8")))
    assert len(trace) > 512 and trace["layers.1.router.ids"].shape == (len(trace), 4)


def test_doctor(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and {"torch", "CPU", "tiny"} <= {c["name"] for c in report["checks"]}
    assert cli.main(["doctor"]) == 0
    assert "✓ torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "/nowhere/x.gguf"], "/nowhere/x.gguf"),
        (["info", __file__], "not a GGUF file"),
        (["generate", "GGUF", "--prompt", ""], "empty"),
        (["generate", "GGUF", "--prompt", "x", "--top-k", "0"], "0"),
        (["generate", "GGUF", "--prompt", "x", "--top-k", "99"], "99"),
        (["generate", "GGUF", "--prompt", "x", "--top-p", "7"], "top_p = 7"),
        (["generate", "GGUF", "--prompt", "x" * 600], "context"),
        (["compare", "GGUF", "--b", "topk=2", "--text", __file__], "topk"),
        (["compare", "GGUF", "--b", "top_k", "--text", __file__], "NAME=VALUE"),
        (["compare", "GGUF", "--b", "rule=RelativThreshold(1)"], 'mean "RelativeThreshold"'),
        (["compare", "GGUF", "--b", "rule=FixedK()"], "FixedK"),
        (["compare", "GGUF", "--text", "/nowhere"], "/nowhere: No such file"),
        (["compare", "GGUF", "--domain", "klingon"], "klingon"),
        (["compare", "GGUF", "--text", __file__, "--window", "4096"], "window = 4096"),
        (["trace", "GGUF", "--text", __file__, "--out", "/nowhere/x.npz"], "/nowhere"),
        (["trace", "GGUF", "--text", __file__, "--out", "x.npz", "--names", "nope"], "nope"),
        (["trace", "nope", "--out", "/nowhere/x.npz"], "there is no folder /nowhere"),
        (["trace", "nope", "--out", "x.bin"], "expected a name that ends in .npz, found .bin"),
        (["trace", "nope", "--out", "x.npz", "--max-tokens", "-5"], "--max-tokens -5: expected 1"),
        (["info", "deepseek-v3"], "see ktlab plan deepseek-v3"),
        (["synthesize", "deepseek-v2-lite", "--out", "x.bin"], "ends in .gguf, found .bin"),
    ],
)
def test_errors_are_one_line_and_code_2(gguf, arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([gguf if a == "GGUF" else a for a in arguments]) == 2
    found = capsys.readouterr()
    assert found.out == "" or "--top-k" not in arguments, "no prompt before a wrong setting"
    assert found.err.startswith("ktlab: ") and found.err.count("\n") == 1
    assert says in found.err and "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []


def test_binary_and_empty_texts(gguf, tmp_path, capsys):
    for content, says in ((b"\xff\xfe\x00", "expected text in UTF-8"), (b"", "empty")):
        path = tmp_path / "t.txt"
        path.write_bytes(content)
        assert cli.main(["compare", gguf, "--text", str(path), "--no-speed"]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["compare"], ["nonsense"], ["generate", "tiny"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: ktlab" in capsys.readouterr().err


def test_settings():
    assert cli.settings(["top_k={3: 6, 4: 4}", "attention=naive,", "quantize=q4_0"]) == {
        "top_k": {3: 6, 4: 4}, "attention": "naive", "quantize": "q4_0",
    }  # fmt: skip
    assert cli.settings(["mask={3:[0,1]}"]) == {"mask": {3: [0, 1]}}
    rule = cli.settings(["rule=RelativeThreshold(0.2, k_max=6)"])["rule"]
    assert rule == RelativeThreshold(0.2, k_max=6)
    with pytest.raises(SettingError):
        cli.settings(["rule=__import__('os')"])
    assert cli.settings(["x=open.read"]) == {"x": "open.read"}, "never evaluated"


def test_interrupt(gguf, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ktlab, "load", interrupted)
    assert cli.main(["info", gguf]) == 130
    assert capsys.readouterr().err == "\nktlab: interrupted\n"


def test_closed_pipe(gguf):
    """`ktlab info MODEL | head -n 1` ends without a word on standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ktlab.cli", "generate", gguf, "--prompt", "x",
         "--max-new-tokens", "200"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(ktlab.__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
