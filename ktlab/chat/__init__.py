"""A conversation with a model: in the terminal, in a notebook, or from a program.

chat = ChatSession(ktlab.load("model.gguf"))
for token in chat.ask("Why is the sky blue?"):
    print(token.text, end="")
print(chat.last)  # speeds, experts used, why it stopped
"""

from ktlab.chat.session import Answer, ChatSession

__all__ = ["Answer", "ChatSession"]
