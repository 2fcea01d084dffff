"""Pieces of texts that begin and end where words do. Pure functions."""


def excerpt(text: str, characters: int = 1200, place: float = 0.4) -> str:
    """About `characters` of `text` from a place in it (0 start, 1 end), beginning on a new line.

    Where no line begins there, it begins at a word.
    """
    start = int(max(0, len(text) - characters) * place)
    if start:
        end = start + characters
        found = text.find("\n", start, end) + 1 or text.find(" ", start, end) + 1
        start = found or start
    return beginning(text[start:].lstrip("\n"), characters)


def beginning(text: str, characters: int) -> str:
    """The first words of a text, about `characters` long, without white space at the end."""
    if len(text) <= characters:
        return text.rstrip() or text
    head = text[:characters]
    space = max(head.rfind(" "), head.rfind("\n"))
    return head[: space if space > characters // 2 else characters].rstrip() or head
