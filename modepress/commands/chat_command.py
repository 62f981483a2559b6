"""chat."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modepress import output
from modepress.chatting import image_part, user_turn
from modepress.client import Client
from modepress.commands.options import ApiKey, AsJson, Url, connect

Turn = dict[str, Any]


def chat(
    model_id: Annotated[str, typer.Argument(metavar="MODEL")],
    prompt: Annotated[
        str | None, typer.Argument(help="Without one: a conversation, or stdin.", show_default=False)
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="PNG, JPEG, WebP or GIF; may be given again.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="What answers: transformers, or an ONNX graph of the model, e.g. onnx-int8.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Ask a model: one prompt, or a conversation (end it with Ctrl-D)."""
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "engine": engine,
    }
    start: list[Turn] = [{"role": "system", "content": system}] if system else []
    pictures = [image_part(path) for path in image or ()]
    with connect(url, api_key) as client:
        if prompt is None and sys.stdin.isatty() and not as_json:
            _converse(client, model_id, start, sampling, pictures)
            return
        said = prompt if prompt is not None else sys.stdin.read()
        turns = [*start, user_turn(said, pictures)]
        if as_json:
            output.write_json(client.chat(model_id, turns, **sampling))
        else:
            _stream(client, model_id, turns, sampling)


def _converse(
    client: Client, model_id: str, turns: list[Turn], sampling: dict[str, Any], pictures: list[dict[str, Any]]
) -> None:
    while True:
        try:
            said = input("you: ")
        except EOFError:
            sys.stdout.write("\n")
            return
        if not said.strip():
            continue
        sys.stdout.write(f"{model_id}: ")
        turns, pictures = [*turns, user_turn(said, pictures)], []  # they stay in the first turn
        turns = [*turns, {"role": "assistant", "content": _stream(client, model_id, turns, sampling)}]


def _harmless(text: str) -> str:
    """A model may write anything, also sequences that a terminal obeys: those are shown as a mark."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _stream(client: Client, model_id: str, turns: list[Turn], sampling: dict[str, Any]) -> str:
    text = ""
    reason = None
    for piece in client.chat_stream(model_id, turns, **sampling):
        text += piece.text
        reason = piece.finish_reason or reason
        sys.stdout.write(_harmless(piece.text) if sys.stdout.isatty() else piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if reason == "length":
        output.err.print(f"(cut at --max-tokens {sampling['max_tokens']})")
    return text
