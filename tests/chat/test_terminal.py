"""The chat as people start it: pipes, a real terminal with Ctrl-C, and KTransformers' names."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ktlab
from ktlab import cli, local_chat
from ktlab.chat.terminal import talk
from tests.chat.conftest import TEMPLATE, tokenizer, write

ROOT = Path(ktlab.__file__).parents[1]

RULES = """
- match: {name: "mlp\\\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {generate_device: cpu, generate_op: KExpertsTorch}
  recursive: False
- match: {name: "^lm_head$"}
  replace: {class: default, kwargs: {generate_device: "cuda:0", prefill_device: "cuda:0"}}
"""


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_pipe(gguf, typed, capsys):
    typed('Hello\n/experts 2\n/nonsense\n"""two\nlines"""\n\n   \n/quit\nnever asked\n')
    assert cli.main(["chat", gguf, "-n", "4", "--temperature", "0", "-s", "Be brief."]) == 0
    captured = capsys.readouterr()
    model = ktlab.load(gguf)
    ids = model.tokenizer.encode("<bos>[s]Be brief.[u]Hello[a]", bos=False, special=True)
    expected = model.generate(ids, max_new_tokens=4).text
    assert captured.out.startswith(f"{expected}\n")
    assert captured.err.count("[prefill") == 2, "two questions"
    assert "4 experts, as trained" in captured.err and "2 experts, trained with 4" in captured.err
    assert "there is no /nonsense" in captured.err and "(+ " in captured.err


def test_a_base_model_says_so(base_gguf, typed, capsys):
    typed("def f(\n")
    assert cli.main(["chat", base_gguf, "-n", "2"]) == 0
    assert "no chat template (a base model): your text is continued" in capsys.readouterr().err


def test_a_question_that_does_not_fit_and_then_one_that_does(gguf, typed, capsys):
    typed("x" * 100 + "\nshort\n")
    assert cli.main(["chat", gguf, "-n", "2", "-c", "64"]) == 0
    said = capsys.readouterr().err
    assert "the context is full" in said and said.count("[prefill") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-k", "99"], "top_k = 99; expected 1 to"),
        (["-c", "100000"], "a context of 100000 tokens"),
        (["--temperature", "-1"], "temperature = -1"),
        (["--set", "nonsense"], "expected NAME=VALUE"),
    ],
)
def test_bad_options(arguments, expected, gguf, typed, capsys):
    typed("")
    assert cli.main(["chat", gguf, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    endless = write(tmp_path / "endless.gguf", eos_id=None)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ktlab.cli", "chat", str(endless), "-n", "480"],
        stdin=slave, stdout=slave, stderr=slave, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
        # A shell's background job, which these tests may be, ignores Ctrl-C, as would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(slave)
    seen = b""

    def wait_until(holds, timeout_s: float = 60) -> None:
        nonlocal seen
        deadline = time.monotonic() + timeout_s
        while not holds(seen):
            left = deadline - time.monotonic()
            ready = select.select([master], [], [], max(0, left))[0]
            assert ready, f"after {timeout_s} s: {seen.decode(errors='replace')}"
            seen += os.read(master, 4096)

    try:
        wait_until(lambda seen: b"> " in seen)
        time.sleep(0.5)  # readline writes its prompt and then begins to wait
        process.send_signal(signal.SIGINT)  # at the prompt: a hint, nothing else
        wait_until(lambda seen: b"/quit or Ctrl-D leaves" in seen)
        for question in (b"one", b"two"):
            seen = b""
            os.write(master, question + b"\n")
            wait_until(lambda seen: len(seen) > 30)
            process.send_signal(signal.SIGINT)
            wait_until(lambda seen: b"stopped by you" in seen)
        os.write(master, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_local_chat_by_its_own_names(gguf, tmp_path, typed, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("From a file.")
    names = [
        "--gguf_path",
        gguf,
        "--max_new_tokens",
        "3",
        "--cpu_infer",
        "1",
        "--cache_lens",
        "128",
    ]
    names += ["--prompt_file", str(prompt)]
    typed("")
    assert local_chat.main(names) == 0
    said = capsys.readouterr()
    length = len("<[u]From a file.[a]")  # one token for <bos>
    assert f"prefill {length} tokens at" in said.err and "context 128 tokens" in said.err
    typed(f"\n/clear\n{prompt}\n")  # an empty line, and the file's name
    names[1] = str(Path(gguf).parent)  # the folder names the model, too
    assert local_chat.main([*names, "--force-think", "True"]) == 0
    said = capsys.readouterr()
    assert said.err.count(f"prefill {length + len('<think>!')} tokens at") == 2
    assert said.out.count("<think>\n") == 2


def test_local_chat_takes_the_template_of_its_model_path(gguf, base_gguf, tmp_path, typed, capsys):
    own = tokenizer()
    byte = {token: i for i, token in enumerate(own.tokens[:256])}
    added = [
        {"id": 256 + i, "content": name, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, name in enumerate(("<bos>", "<eos>"))
    ]  # fmt: skip
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {"type": "BPE", "vocab": byte, "merges": []}
    content = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1, "top_p": 0.5}')
    names = ["--gguf_path", base_gguf, "--model_path", str(tmp_path), "--max_new_tokens", "2"]
    typed("Hi\n/show\n")
    assert local_chat.main(names) == 0
    said = capsys.readouterr().err
    assert f"prefill {len('<[u]Hi[a]')} tokens" in said and "no chat template" not in said
    assert "temperature 0.1, top-p 0.5" in said
    byte["A"], byte["B"] = byte["B"], byte["A"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert local_chat.main(names) == 2
    assert "of another model than the weights: of 258 tokens 2 differ" in capsys.readouterr().err


def test_local_chat_applies_a_rule_file_and_says_what_it_did(gguf, tmp_path, typed, capsys):
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    typed("Hi\n/show\n")
    names = ["--gguf_path", gguf, "--max_new_tokens", "2", "--optimize_config_path", str(rules)]
    assert local_chat.main(names) == 0
    said = capsys.readouterr().err
    assert said.startswith("rules.yaml: 2 rules on tiny-test\nexperts: f32, ")
    assert "-> f32, torch (model.layers.1-2.mlp.experts)\n" in said
    assert "rule 2: asks for cuda:0; computed on the CPU\n" in said
    assert "backend torch" in said, "/show tells how the model is set"


def test_chat_takes_rules_and_then_what_is_named_beside_them(gguf, typed, capsys):
    typed("/show\n")
    assert cli.main(["chat", gguf, "--rules", "torch-reference", "--set", "backend=numpy"]) == 0
    said = capsys.readouterr().err
    assert "torch-reference.yaml: 2 rules on tiny-test" in said and "backend numpy" in said
    assert cli.main(["chat", gguf, "--rules", "torch-referense"]) == 2
    assert 'did you mean "torch-reference"' in capsys.readouterr().err


def test_local_chat_refuses_together_what_it_has_not(tmp_path, capsys):
    rules = tmp_path / "r.yaml"
    rules.write_text("- match: {name: a}")
    wanted = ["--optimize_config_path", str(rules), "--mode=long_context", "--use_cuda_graph"]
    assert local_chat.main(wanted) == 2
    said = capsys.readouterr().err
    for word in ("has no replace", "expected normal", "CUDA", "neither --gguf_path nor"):
        assert word in said
    assert local_chat.main(["--gguf_path", "/no/such/folder"]) == 2
    assert "--gguf_path /no/such/folder: there is no such" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["word" * 100, "zero\0byte"])
def test_local_chat_asks_a_line_that_cannot_be_a_files_name(question, gguf, typed, capsys):
    typed(f"{question}\n")
    assert local_chat.main(["--gguf_path", gguf, "--max_new_tokens", "2"]) == 0
    assert f"prefill {len(f'<[u]{question}[a]')} tokens" in capsys.readouterr().err


def test_local_chat_goes_on_after_a_file_that_cannot_be_read(
    gguf, tmp_path, typed, capsys, monkeypatch
):
    named = tmp_path / "secret.txt"
    named.write_text("secret")

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    typed(f"{named}\nHi\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert local_chat.main(["--gguf_path", gguf, "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "Permission denied" in said and said.count("[prefill") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot', expected a number"),
        ("[1]", "holds a list, expected a JSON object"),
        ("{", "generation_config.json is no JSON"),
    ],
)
def test_local_chat_refuses_odd_sampling(content, expected, gguf, tmp_path, typed, capsys):
    (tmp_path / "generation_config.json").write_text(content)
    assert local_chat.main(["--gguf_path", gguf, "--model_path", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert expected in said and "generation_config.json" in said


def test_local_chat_reads_a_prompt_file_of_any_bytes_and_says_what_it_ignores(
    gguf, tmp_path, typed, capsys
):
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"caf\xe9")
    names = ["--gguf_path", gguf, "--max_new_tokens", "2", "--prompt_file", str(prompt)]
    typed("")
    assert local_chat.main([*names, "--chunk_prefill_size", "2048"]) == 0
    said = capsys.readouterr().err
    assert f"prefill {len('<[u]caf???[a]')} tokens" in said
    assert said.count("--chunk_prefill_size 2048 changes nothing: prefill goes in pieces") == 1


def test_local_chat_downloads_nothing_and_says_so(capsys):
    names = ["--model_path", "deepseek-ai/DeepSeek-V2-Lite-Chat", "--cache_lens", "0"]
    assert local_chat.main(names) == 2
    said = capsys.readouterr().err
    assert "nothing is downloaded here: name the folder that holds a copy" in said
    assert "--cache_lens 0: expected 1 token or more" in said


def test_a_context_of_nothing_is_refused(gguf, typed, capsys):
    assert cli.main(["chat", gguf, "-c", "0"]) == 2
    assert "context 0: expected at least 1" in capsys.readouterr().err


def test_talk_in_a_thread_needs_no_signals(model):
    import threading

    from ktlab.chat import ChatSession

    chat = ChatSession(model, max_new_tokens=2)
    thread = threading.Thread(target=talk, args=(chat,), kwargs={"stdin": io.StringIO("one\n")})
    thread.start()
    thread.join(30)
    assert chat.last is not None
