"""A conversation computes what one forward pass over its whole history would, and no more."""

import threading

import pytest

from ktlab.chat import Answer, ChatSession, session
from ktlab.chat.commands import Ask, CommandError, Leave, run_command
from ktlab.errors import ContextError, KtlabError, SettingError
from ktlab.model.model import Model
from ktlab.placement import Placement
from ktlab.routing.rules import FixedK
from tests.model.strict_seat import StrictSeat


def ask(chat: ChatSession, text: str, **options: object) -> Answer:
    list(chat.ask(text, **options))  # type: ignore[arg-type]
    assert chat.last is not None
    return chat.last


def greedy(model: Model, **options: object) -> ChatSession:
    return ChatSession(model, temperature=0.0, max_new_tokens=6, **options)  # type: ignore[arg-type]


def test_only_what_is_new_is_prefilled_and_the_answer_is_the_same(model: Model) -> None:
    chat = greedy(model, system="Be brief.")
    first = ask(chat, "Grüße 🙂")
    assert first.reused_tokens == 0 and 0 < len(first.ids) <= 6
    second = ask(chat, "And now?")
    # All of the first question and answer but the answer's last token, which was never fed.
    assert second.reused_tokens == first.prompt_tokens + len(first.ids) - 1
    question = model.tokenizer.encode("<bos>[s]Be brief.[u]Grüße 🙂[a]", bos=False, special=True)
    follows = model.tokenizer.encode("<eos>[u]And now?[a]", bos=False, special=True)
    assert chat._ids[: second.prompt_tokens] == [*question, *first.ids, *follows]
    fresh = list(chat.model.stream(chat._ids[: second.prompt_tokens], max_new_tokens=6))
    assert [token.id for token in fresh] == list(second.ids)
    assert chat.messages[-1] == {"role": "assistant", "content": second.text}
    assert chat.used_tokens == second.prompt_tokens + len(second.ids) - 1
    assert (
        "prefill" in str(second) and "(+ " in str(second) and "4 experts, as trained" in str(second)
    )
    assert "4 messages" in repr(chat)


def test_a_rewritten_history_is_read_from_where_it_differs(model: Model) -> None:
    chat = greedy(model)
    first = ask(chat, "one")
    chat.messages[-1]["content"] = "hm</think>fine"  # the template leaves the thought out
    second = ask(chat, "two")
    assert second.reused_tokens <= first.prompt_tokens
    expected = model.tokenizer.encode("<bos>[u]one[a]fine<eos>[u]two[a]", bos=False, special=True)
    assert chat._ids[: second.prompt_tokens] == expected
    fresh = list(chat.model.stream(expected, max_new_tokens=6))
    assert [token.id for token in fresh] == list(second.ids)


def test_switches_are_live(model: Model) -> None:
    chat = greedy(model)
    ask(chat, "one")
    chat.model.set(top_k=2)
    answer = ask(chat, "two")
    assert answer.reused_tokens > 0 and answer.experts == "2 experts, trained with 4"
    assert model.layers[1].router.rule == FixedK(4), "the reader's model is not touched"
    chat.model.set(attention="naive")
    answer = ask(chat, "three")
    assert answer.reused_tokens == 0, "the other form of attention remembers other things"
    run_command(chat, "/set rule=RelativeThreshold(0.95,k_max=4)")
    average = ask(chat, "four").experts
    assert average.endswith("experts on average, trained with 4") and 1 <= float(average[:3]) < 4


def test_experts_are_counted_on_a_device(model: Model) -> None:
    everywhere = Placement.everywhere(model.config, "cuda:0")
    chat = greedy(model)
    chat.model.place(everywhere, stand_in={"cuda:0": StrictSeat("cuda:0")})
    run_command(chat, "/set rule=RelativeThreshold(0.95,k_max=4)")
    average = ask(chat, "one").experts
    assert average.endswith("experts on average, trained with 4") and 1 <= float(average[:3]) < 4


def test_stopping_keeps_what_was_written(model: Model) -> None:
    chat, cancel = greedy(model), threading.Event()
    for _ in chat.ask("one", cancel=cancel):
        cancel.set()
    assert chat.last is not None and chat.last.stopped == "cancelled" and len(chat.last.ids) == 1
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert "stopped by you" in str(chat.last)
    answer = ask(chat, "two")
    fresh = chat.model.stream(chat._ids[: answer.prompt_tokens], max_new_tokens=6)
    assert [token.id for token in fresh] == list(answer.ids)
    # A reader who walks away in the middle leaves a conversation that goes on.
    for _ in chat.ask("three"):
        break
    assert chat.last.stopped == "cancelled" and len(chat.messages) == 6


def test_stopping_while_a_prompt_is_read(model: Model) -> None:
    chat = greedy(model, context=512)
    ask(chat, "one")
    messages, used, cancel = list(chat.messages), chat.used_tokens, threading.Event()
    cancel.set()
    answer = ask(chat, "x" * 300, cancel=cancel)
    assert (answer.ids, answer.stopped) == ((), "cancelled")
    assert chat.messages == messages and chat.used_tokens <= used
    assert ask(chat, "two").reused_tokens > 0


def test_reading_a_long_prompt_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    chat = ChatSession(model, max_new_tokens=1)
    ask(chat, "x" * 100, on_prefill=lambda done, total: told.append((done, total)))
    assert told == [], "one piece is no progress"
    monkeypatch.setattr(session, "CHUNK", 64)
    hidden = Model._hidden

    def pieces(self, ids_BT, cache, lengths, probe, chunk):
        return hidden(self, ids_BT, cache, lengths, probe, 64)

    monkeypatch.setattr(Model, "_hidden", pieces)
    chat.clear()
    total = ask(chat, "x" * 200, on_prefill=lambda *of: told.append(of)).prompt_tokens
    assert told == [(done, total) for done in (0, 64, 128, 192)]


def test_a_full_context(model: Model) -> None:
    chat = ChatSession(model, temperature=0.0, max_new_tokens=100, context=40)
    answer = ask(chat, "x" * 20)
    assert answer.stopped == "context" and "the context is full" in str(answer)
    messages = list(chat.messages)
    with pytest.raises(ContextError, match="room for 40.*/clear.*the model has 512"):
        ask(chat, "more")
    assert chat.messages == messages
    run_command(chat, "/clear")
    assert ask(chat, "y").prompt_tokens < 20
    with pytest.raises(ContextError, match="context of 1000"):
        ChatSession(model, context=1000)


def test_a_base_model_continues_the_text(base: Model) -> None:
    chat = greedy(base)
    assert chat.template is None and "plain text" in repr(chat)
    first = ask(chat, "def f(")
    assert list(first.ids) == [t.id for t in base.stream("def f(", max_new_tokens=6)]
    second = ask(chat, "more")
    assert second.reused_tokens == first.prompt_tokens + len(first.ids) - 1
    assert chat._text.startswith(f"def f({first.text}\nmore")


def test_thinking_is_forced(model: Model) -> None:
    chat = greedy(model, force_think=True)
    answer = ask(chat, "one")
    asked = chat.tokenizer.decode(chat._ids[: answer.prompt_tokens])
    assert asked.endswith("[u]one[a]<think>\n")
    assert chat.messages[-1]["content"].startswith("<think>\n")


def test_sampling_is_drawn_anew_and_repeatable(model: Model) -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        chat = ChatSession(model, temperature=1.5, top_p=1.0, max_new_tokens=6, seed=seed)
        answers = []
        for _ in range(2):
            answers.append(ask(chat, "one").ids)
            chat.clear()
        return answers

    assert run(0) == run(0) and len(set(run(0))) == 2
    with pytest.raises(SettingError, match="temperature = -1.*top_p = 2"):
        ChatSession(model, temperature=-1, top_p=2)


def test_commands(model: Model, tmp_path) -> None:
    chat = greedy(model)
    assert "k = 2; trained with 4" in run_command(chat, "/experts 2")
    assert run_command(chat, "/experts") == "k = 2; trained with 4"
    assert "attention naive" in run_command(chat, "/set top_k={1:3,2:1} attention=naive")
    assert chat.model.moe_blocks[0].router.rule == FixedK(3)
    assert run_command(chat, "/system You are 'brief'.") == "system message set"
    assert chat.system == "You are 'brief'."
    assert "no system" in run_command(chat, "/system")
    assert "at most 3 new" in run_command(chat, "/max 3") and chat.max_new_tokens == 3
    assert run_command(chat, "/temperature 0.2") == "temperature 0.2"
    assert "attention naive" in run_command(chat, "/show") and "0 of 512" in run_command(
        chat, "/show"
    )
    listed = run_command(chat, "/help")
    assert all(f"/{word}" in listed for word in ("experts K", "set NAME", "clear", "quit"))
    with pytest.raises(Leave):
        run_command(chat, "/quit")
    (tmp_path / "q.txt").write_text("Why?")
    with pytest.raises(Ask) as asked:
        run_command(chat, f"/read {tmp_path / 'q.txt'}")
    assert asked.value.text == "Why?"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/expert 6", 'no /expert; did you mean "/experts"'),
        ("/experts six", "/experts six: expected a whole number"),
        ("/experts 99", "top_k = 99; expected 1 to"),
        ("/set", "expected NAME=VALUE"),
        ("/set top_k", "expected NAME=VALUE"),
        ("/set topk=3", 'did you mean "top_k"'),
        ("/set 'x", "No closing quotation"),
        ("/max 0", "max_new_tokens = 0"),
        ("/temperature hot", "expected a number"),
        ("/temperature -1", "temperature = -1"),
        ("/read", "expected the name"),
        ("/read /no/such", "No such file"),
    ],
)
def test_bad_commands_change_nothing(line: str, expected: str, model: Model) -> None:
    chat = greedy(model)
    before = (chat.model.settings, chat.max_new_tokens, chat.temperature, chat.messages)
    with pytest.raises(KtlabError, match=expected):
        run_command(chat, line)
    assert (chat.model.settings, chat.max_new_tokens, chat.temperature, chat.messages) == before
    assert issubclass(CommandError, KtlabError)
