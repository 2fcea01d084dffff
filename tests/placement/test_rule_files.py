"""Rule files as text: the grammar, and everything that can be wrong with one, said at once."""

import os
from pathlib import Path
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import RuleError
from ktlab.model.model import Model
from ktlab.placement.patterns import LIMIT_S, Pattern, SlowPatternError
from ktlab.placement.rules import RuleSet
from ktlab.placement.rules.reading import LIMIT_BYTES, LIMIT_PATTERN

EXPERTS = "ktransformers.operators.experts.KTransformersExperts"
LINEAR = "ktransformers.operators.linear.KTransformersLinear"
ATTENTION = "ktransformers.operators.attention.KDeepseekV2Attention"
MODEL = "ktransformers.operators.models.KDeepseekV2Model"

# Written here, with the grammar, the comments and the class names that KTransformers' files have.
GPU_AND_CPU = r"""
- match:
    class: ktransformers.models.modeling_deepseek_v3.DeepseekV3RotaryEmbedding
  replace:
    class: ktransformers.operators.RoPE.YarnRotaryEmbeddingV3
    kwargs:
      generate_device: "cuda:0"
      prefill_device: "cuda:0"
- match:
    name: "^model\\.layers\\.([0-9]+)\\.(?!self_attn\\.kv_b_proj).*$"  # everything but kv_b
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: cuda, prefill_device: cuda, generate_op: KLinearMarlin, prefill_op: KLinearTorch}

- match:
    class: ktransformers.models.modeling_deepseek_v3.MoEGate
  replace:
    class: ktransformers.operators.gate.KMoEGate
    kwargs: {generate_device: "cuda:0", prefill_device: "cuda:0"}
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: "cuda"
      prefill_op: "KExpertsTorch"
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      out_device: "cuda"
      backend: "AMXInt8"  # or "llamafile"
  recursive: False
- match:
    name: "^model\\.layers\\..*\\.self_attn$"
  replace:
    class: ktransformers.operators.attention.KDeepseekV2Attention
    kwargs:
      generate_device: "cuda"
      absorb_for_prefill: True
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      per_layer_prefill_intput_threshold: 0
      transfer_map:
        2: "cuda:1"
- match:
    name: "^model.embed_tokens"
  replace:
    class: "default"
    kwargs:
      generate_device: "cpu"
      prefill_device: "cpu"
- match:
    name: "(^model\\.layers\\.)|(model.norm)|(lm_head)"
  replace:
    class: "default"
    kwargs: {generate_device: "cuda:1", prefill_device: "cuda:1"}
"""  # noqa: E501

# The same words as they were called at first.
FIRST_RELEASE = r"""
- match: {name: "^model\\.layers\\.(?!.*self_attn).*$", class: torch.nn.Linear}
  replace:
    class: ktransformers.operators.linear.KTransformerLinear
    kwargs: {generate_device: cuda, generate_op: QuantizedLinearMarlin, prefill_op: QuantizedLinearTorch}
- match: {class: ktransformers.models.modeling_deepseekv3.DeepseekV3MoE}
  replace: {class: ktransformers.operators.experts.DeepseekV2MoEInjected}
- match: {name: "mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersMLPExpert
    device: "cpu"
    kwargs: {prefill_mlp_type: MLPExpertsTorch, generate_mlp_type: MLPCPUExperts, n_deferred_experts: [6, 8]}
  recursive: False
- match: {name: "^model$"}
  replace: {class: ktransformers.operators.layer_wise_prefill.DeepseekV2ModelPerLayerPrefill}
- match: {class: ktransformers.models.modeling_llama4.Llama4TextMLP}
  replace: {class: default, kwargs: }
"""  # noqa: E501


def rule(match: str = "name: a", replace: str = "class: default", rest: str = "") -> str:
    return f"- match: {{{match}}}\n  replace: {{{replace}}}\n{rest}"


def test_the_grammar() -> None:
    rules = RuleSet.parse(GPU_AND_CPU, "both.yaml").rules
    assert [r.number for r in rules] == list(range(1, 9)) and rules[1].line == 9
    rope, linear, _, experts, _, model, *_ = rules
    assert rope.name is None and linear.match_class == "torch.nn.Linear"
    assert linear.named("model.layers.12.mlp.gate_proj") and not linear.named("lm_head")
    assert not linear.named("model.layers.12.self_attn.kv_b_proj")
    assert (experts.recursive, linear.recursive) == (False, True)
    assert experts.kwargs["backend"] == "AMXInt8" and experts.replace_class == EXPERTS
    assert model.kwargs["transfer_map"] == {2: "cuda:1"}
    assert RuleSet.parse(GPU_AND_CPU, "both.yaml") == RuleSet.parse(GPU_AND_CPU, "both.yaml")
    shown = repr(RuleSet.parse(GPU_AND_CPU, "both.yaml"))
    assert "RuleSet(both.yaml, 8 rules)" in shown and "rule 4 (line 21)" in shown


def test_the_words_of_the_first_release() -> None:
    kinds = [r.kind for r in RuleSet.parse(FIRST_RELEASE).rules]
    assert kinds == ["matrix", "moe", "experts", "model", "default"]


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        ("", 1, "expected a list of rules, each with match and replace; found nothing"),
        ("[]", 1, "found an empty list"),
        ("match: 1", 1, "found a mapping"),
        ("- 17", 1, "rule 1: expected match, replace, recursive, found int '17'"),
        ("- replace: {class: default}", 1, "rule 1 has no match"),
        ("- match: {name: a}", 1, "rule 1 has no replace"),
        (rule(match=""), 1, "match needs a name, a class, or both"),
        (rule(match="nam: a"), 1, "unknown key 'nam'; expected name, class; did you mean \"name\""),
        (rule(match="name: a, name: b"), 1, "name stands here twice"),
        (rule(match="name: 5"), 1, "name: expected text, found 5"),
        (rule(match="5: a"), 1, "expected words as keys, found int '5'"),
        (rule(match=r"name: '^a\.(b'"), 1, r"'\^a\\\.\(b' is no regular expression: missing"),
        (rule(match="name: '(a'"), 1, r"'\(a' is no regular expression: missing \), unterminated"),
        (rule(match=f"name: {'a' * 1001}"), 1, "a regular expression of 1,001 characters"),
        (rule(match="class: torch.nn.Linaer"), 1, 'did you mean "torch.nn.Linear"'),
        (rule(match="class: os.system"), 1, "match class 'os.system' is unknown"),
        (
            rule(match="class: ktransformers.models.modeling_deepseek.DeepseekV2MoEs"),
            1,
            'did you mean "ktransformers.models.modeling_deepseek.DeepseekV2MoE"',
        ),
        (rule(replace=f"class: {EXPERTS}x"), 2, f'did you mean "{EXPERTS}'),
        (rule(replace="class: nonsense"), 2, "replace class 'nonsense' is unknown"),
        (rule(replace="clas: default"), 2, 'did you mean "class"'),
        (rule(rest="  recursive: 'False'"), 3, "recursive is True or False, found 'False'"),
        (rule(rest="  recursiv: False"), 3, 'did you mean "recursive"'),
        (
            rule(replace=f"class: {EXPERTS}, kwargs: {{generate_opp: KExpertsCPU}}"),
            2,
            "unknown key 'generate_opp'; expected .*; did you mean \"generate_op\"",
        ),
        (rule(replace="class: default, kwargs: {backend: AMXInt8}"), 2, "unknown key 'backend'"),
        (
            rule(replace=f"class: {EXPERTS}, kwargs: {{backend: AMXint8}}"),
            2,
            "backend: 'AMXint8' is unknown; expected llamafile, .*did you mean \"AMXInt8\"",
        ),
        (rule(replace=f"class: {LINEAR}, kwargs: {{prefill_op: KExpertsCPU}}"), 2, "prefill_op: "),
        (rule(replace="kwargs: {generate_device: 'cuda:x'}"), 2, "'cuda:x' is no device"),
        (rule(replace="kwargs: {prefill_device: 'cpu:7'}"), 2, "expected cpu, or cuda, cuda:0"),
        (rule(replace="kwargs: {out_device: 0}"), 2, "out_device: 0 is no device"),
        (rule(replace="device: gpu"), 2, "device: 'gpu' is no device"),
        (
            rule(replace=f"class: {ATTENTION}, kwargs: {{absorb_for_prefill: 1}}"),
            2,
            "absorb_for_prefill: expected True or False, found 1",
        ),
        (
            rule(replace=f"class: {MODEL}, kwargs: {{transfer_map: {{a: cpu, 3: gpu}}}}"),
            2,
            "transfer_map: expected a whole number from 0 on, found 'a'; 'gpu' is no device",
        ),
        (
            rule(replace=f"class: {MODEL}, kwargs: {{per_layer_prefill_intput_threshold: 0x_}}"),
            2,
            "expected a number, found int '0x_'",
        ),
        ("- &a\n  match: *a", 1, r"anchors \(&\) and aliases \(\*\) are not read here"),
        ("- !!python/object:os.system x", 1, "tags .* are not read here"),
        ("[" * 5000, 1, "nested more than 10 deep"),
    ],
)
def test_what_can_be_wrong(text: str, where: int, expected: str) -> None:
    with pytest.raises(RuleError, match=rf"(?s)^bad\.yaml: \d+ problems?\n.*{expected}") as caught:
        RuleSet.parse(text, "bad.yaml")
    assert f"line {where}, column " in str(caught.value)


@pytest.mark.parametrize(
    ("written", "offset"),
    [
        ("'(a'", 1), ("a(b", 1), ("'ab[c'", 3), (r'"\\.(b"', 4), (r"'it''s ('", 7),
        (r'"\x41(b"', 5), ('"(?P<n>a)(?P<n>b)"', 13),
    ],
)  # fmt: skip
def test_where_a_regular_expression_breaks(written: str, offset: int) -> None:
    """The column of the character itself, behind quotes and escapes."""
    text = f"- match:\n    name: {written}\n  replace: {{class: default}}\n"
    column = len("    name: ") + offset + 1
    with pytest.raises(RuleError, match=f"line 2, column {column}: .* no regular expression: "):
        RuleSet.parse(text)


SLOW = r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)\1[!%]"
"""Tries every way to cut a module's name into seven, of which there are more than anybody waits
for; `re` takes as long for a repeat inside a repeat."""


@pytest.mark.parametrize(
    "pattern", [r"^(model[.a-z]+)+%$", r"^(\w+\.?)+[!%]$", r"^(.*)*(.*)*(.*)*[!%]$"]
)
def test_a_repeat_inside_a_repeat_does_no_harm(pattern: str) -> None:
    rules = RuleSet.parse(f"- match:\n    name: '{pattern}'\n  replace:\n    class: default\n")
    begun = process_time()
    preview = rules.preview(Model(synthesize(TINY_TEST_CONFIG)))
    assert "no module here has such a name" in str(preview) and process_time() - begun < 30


def test_a_pattern_that_backtracks_for_ever_is_given_up() -> None:
    """All of them together, by line and column; a class that does not fit is not searched for."""
    model = Model(synthesize(TINY_TEST_CONFIG))
    text = "".join(
        f"- match:\n    name: '{name}'\n{more}  replace:\n    class: default\n"
        for name, more in (
            (SLOW, ""), ("^model", "    class: torch.nn.Linear\n"), (SLOW.replace("!", "+"), "")
        )
    )  # fmt: skip
    rules = RuleSet.parse(text, "slow.yaml")
    for use in (rules.preview, rules.apply, rules.placement):
        before, begun = repr(model.settings), process_time()
        with pytest.raises(RuleError) as caught:
            use(model)
        assert process_time() - begun < 60 and repr(model.settings) == before
        lines = str(caught.value).splitlines()
        assert lines[0] == "slow.yaml: 2 problems"
        assert (
            lines[1].startswith(f"  line 2, column 11: rule 1: {SLOW} takes")
            and "repeat" in lines[1]
        )
        assert lines[2].startswith("  line 11, column 11: rule 3: ")


def test_slow_searches_add_up() -> None:
    """A pattern that is just fast enough for one name is not for a hundred thousand."""
    pattern, name = Pattern(SLOW), "a"
    while pattern._left_s > LIMIT_S - 0.002:
        pattern.search(name := name + "a")
    with pytest.raises(SlowPatternError, match="takes more than 1 s"):
        for _ in range(10_000):
            pattern.search(name)
    with pytest.raises(SlowPatternError):
        pattern.search("b")
    quick = Pattern(r"^model\.layers\.(?!.*kv_b).*$")
    names = [f"model.layers.{i}.mlp.gate" for i in range(1000)]
    assert all(map(quick.search, names)) and quick._left_s > 0.9


def test_everything_wrong_is_said_at_once() -> None:
    texts = [rule(match="name: '(a'"), rule(replace="device: gpu"), "- 17\n", rule(match="")]
    with pytest.raises(RuleError) as caught:
        RuleSet.parse("".join(texts), "bad.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "bad.yaml: 4 problems"
    assert [line.split(",")[0].strip() for line in lines[1:]] == [
        "line 1", "line 4", "line 5", "line 6"
    ]  # fmt: skip
    with pytest.raises(RuleError, match="60 problems\n(?s:.*)and 20 more$"):
        RuleSet.parse("- 17\n" * 60)


def test_what_sound_rules_do_is_said_with_what_is_wrong_with_the_others() -> None:
    """One error for the text and for the model, as far as the sound rules can tell."""
    model = Model(synthesize(TINY_TEST_CONFIG))
    texts = [
        rule(match="nam: a"),
        rule(match="name: layers.9", replace="class: default"),
        rule(match="name: o_proj$"),
        rule(match="class: torch.nn.Linear, name: self_attn.o_proj"),
        rule(match="name: lm_head", replace="device: 'xpu:1'"),
    ]
    with pytest.raises(RuleError) as caught:
        RuleSet.parse("".join(texts), "bad.yaml", model=model)
    found = str(caught.value).splitlines()
    assert found[0] == "bad.yaml: 4 problems" and len(found) == 5
    for line, where, words in zip(
        found[1:],
        ("line 1, column 11", "line 3, column 17", "line 7, column 41", "line 9, column 17"),
        ("unknown key 'nam'", "rule 2 matches nothing: no module", "rule 4 comes too late",
         "rule 5 asks for xpu:1: a placement knows cpu"),
        strict=True,
    ):  # fmt: skip
        assert line.startswith(f"  {where}: ") and words in line
    with pytest.raises(RuleError, match="1 problem\n(?s:.*)4 rules are sound; .* not looked at"):
        RuleSet.parse("".join(texts), "bad.yaml")
    slow = "".join([texts[0], rule(match=f"name: '{SLOW}'")])
    with pytest.raises(RuleError, match="2 problems(?s:.*)unknown key(?s:.*)rule 2: .* takes more"):
        RuleSet.parse(slow, "bad.yaml", model=model)
    assert RuleSet.parse("".join(texts[1:]), model=model).rules, "what preview tells is no error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- match: [", "not YAML: line 1, column 11: .*expected the node content"),
        ("- a\n\t- b", "not YAML: line 2, column 1: .*cannot start any token"),
        ("--- \n- a\n---\n- b", "not YAML: line 3, column 1: .*single document"),
        ("- \x00", "not YAML: unacceptable character"),
        ("#" * (LIMIT_BYTES + 1), "131,073 bytes; a rule file has at most 131,072"),
    ],
)
def test_not_yaml(text: str, expected: str) -> None:
    with pytest.raises(RuleError, match=f"bad.yaml: {expected}"):
        RuleSet.parse(text, "bad.yaml")


def test_the_longest_pattern_that_is_read() -> None:
    (read,) = RuleSet.parse(rule(match=f"name: {'a' * LIMIT_PATTERN}")).rules
    assert read.named("a" * LIMIT_PATTERN)


@given(st.data())
def test_altered_files_give_rules_or_our_error(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([GPU_AND_CPU, FIRST_RELEASE]))
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 30))
    put = data.draw(st.text("aA0.:-{}[]()*&!#'\"\\\n\t |>?%@~\x00\xe9", max_size=6))
    try:
        RuleSet.parse(text[:at] + put + text[at + cut :])
    except RuleError as error:
        assert "rules: " in str(error)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("\ufeff" + GPU_AND_CPU, encoding="utf-8")
    assert RuleSet.read(path) == RuleSet.read(str(path)) == RuleSet.parse(GPU_AND_CPU, "both.yaml")
    path.write_bytes(b"- \xff\xfe")
    with pytest.raises(RuleError, match=r"both\.yaml: not text in UTF-8 \(.* at byte 2\)"):
        RuleSet.read(path)
    path.write_bytes(b"#" * (LIMIT_BYTES + 10))
    with pytest.raises(RuleError, match="Is it one"):
        RuleSet.read(path)
    with pytest.raises(RuleError, match="Is a directory; expected a YAML file"):
        RuleSet.read(tmp_path)
    with pytest.raises(RuleError, match="No such file"):
        RuleSet.read(tmp_path / "none.yaml")
    with pytest.raises(RuleError, match='one of amx.*cpu-experts.*did you mean "cpu-experts"'):
        RuleSet.read("cpu-expert")


def test_our_own_files_are_read_by_name() -> None:
    for path in data_path("rules").glob("*.yaml"):
        assert RuleSet.read(path.stem).rules and os.path.getsize(path) < 2000
