"""transformers' own server for a MiniGPT: OpenAI's chat completions, completions and responses.

    pip install "hf_minigpt[serve]"
    python -m hf_minigpt serve runs/sft
    python -m hf_minigpt serve you/your-minigpt --continuous-batching --port 8080

`transformers serve` knows no plug-ins; this imports ours, then runs it with all its flags (`--help`). Any client of
OpenAI's API talks to it, under the name of the model as it was given here:

    from openai import OpenAI

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "Who lives in the mill?"}]
    reply = client.chat.completions.create(model="runs/sft", messages=messages)

Chat needs a tokenizer with a chat template, which recipes/sft.py gives; a pretrained model without one answers
`/v1/completions`, and chat requests with status 400. So it does what else is wrong with a request, such as a prompt
that leaves no room in the model's context. A text ends where the context does, with `finish_reason="length"`. An
adapter's folder is served as its base model with the adapter merged.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import typer
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.utils.import_utils import is_serve_available

from .. import adapters
from ..flags import Range
from ..registration import register


class ModelManager(model_manager.ModelManager):
    """Says at the start what will not work, and lists the model that is served rather than the Hub's cache."""

    def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        with _merged(model_id_and_revision, self.trust_remote_code) as name:
            tokenizer = super()._load_processor(name, *args, **kwargs)
        if tokenizer.chat_template is None:
            print("The tokenizer has no chat template: /v1/completions answers, chat does not.", flush=True)
        return tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        with _merged(model_id_and_revision, self.trust_remote_code) as name:
            model = super()._load_model(name, *args, **kwargs)
        if not isinstance(model, GenerationMixin):
            raise ValueError(f"{model_id_and_revision} is a {type(model).__name__}, which writes no text to serve.")
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        if self.force_model is None:
            return super().get_gen_models(cache_dir)
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


@contextlib.contextmanager
def _merged(model_id_and_revision: str, trust_remote_code: bool) -> Iterator[str]:
    # since transformers 5.24 a local path has no revision, and an "@" in it is part of the path
    is_path = os.path.exists(model_id_and_revision) or "@" not in model_id_and_revision
    name, at, revision = (model_id_and_revision, "", "") if is_path else model_id_and_revision.rpartition("@")
    with adapters.merged(name, trust_remote_code=trust_remote_code) as folder:
        yield f"{folder}{at}{revision}"


ROLES = ("system", "user", "assistant", "tool")
NUMBERS = ("temperature", "top_p", "frequency_penalty", "seed")
COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def check_request(body: dict[str, Any]) -> None:
    """Refuse what transformers' handlers stumble over; the role "developer" becomes "system" in place.

    Raises:
        ValueError: with the field, its value and what it may be.
    """
    _check_text(body, "")
    for field in (*NUMBERS, *COUNTS):
        value = body.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{field}={_show(value)} is no number: give one, or leave the field out.")
        if field in COUNTS and value is not None and value < 1:
            raise ValueError(f"{field}={value} must be at least 1.")
    if not isinstance(body.get("model", ""), str | None):
        raise ValueError(f"model={_show(body['model'])} must be a string: the name that /v1/models says.")
    if "messages" in body:
        _check_messages(body["messages"], "messages")
    elif isinstance(body.get("input"), list):
        items = body["input"]
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("input must be a string or a list of objects.")
        # tool calls and their results have no role
        said = [item for item in items if "role" in item]
        if said:
            _check_messages(said, "input")


def _check_messages(messages: Any, field: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'{field}={_show(messages)} must be a list of messages, such as {{"role": "user", "content": "Hello"}}.'
        )
    for i, message in enumerate(messages):
        where = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}={_show(message)} must be an object with "role" and "content".')
        if message.get("role") == "developer":
            # OpenAI's newer name, which few templates know
            message["role"] = "system"
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}.role={_show(message.get('role'))} must be one of {', '.join(ROLES)}.")
        content = message.get("content")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls={_show(calls)} must be a list.")
        is_text = isinstance(content, str) or (content is None and calls)
        if not is_text and not (isinstance(content, list) and all(map(_is_part, content))):
            raise ValueError(
                f"{where}.content={_show(content)} must be a string, or a list of parts such as "
                '{"type": "text", "text": "Hello"}.'
            )


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return not part["type"].endswith("text") or isinstance(part.get("text"), str)


def _check_text(value: Any, where: str) -> None:
    """No lone surrogates anywhere: they are no text, and no tokenizer takes them."""
    if isinstance(value, str):
        for character in value:
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"{where} has U+{ord(character):04X}, half of a surrogate pair, which is no character: send whole "
                    "ones."
                )
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name, f"{where}'s keys" if where else "The request's fields")
            _check_text(item, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_text(item, f"{where}[{i}]")


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _validate_request(handler: utils.BaseHandler, body: dict[str, Any]) -> None:
    _validate_fields(handler, body)
    known = getattr(handler._valid_params_class, "__mutable_keys__", ())
    for field in ("messages", "input"):
        if field in known and body.get(field) is None:
            raise ValueError(f"{field} is missing: give what the model is to answer.")
    check_request(body)


_validate_fields = utils.BaseHandler._validate_request


def fit_into_context(config: GenerationConfig, model: PreTrainedModel, num_prompt_tokens: int) -> None:
    """Lower `config.max_new_tokens`, 1024 where the client says nothing, to what the context holds.

    Raises:
        ValueError: an empty prompt, or one that leaves no room.
    """
    if num_prompt_tokens == 0:
        raise ValueError("The prompt is empty: give the text to go on from.")
    # without a MODEL the server loads any that a request names, and not all are bounded
    context_length = getattr(model.config, "max_position_embeddings", None)
    if context_length is None:
        return
    # the last token written is not read again
    room = context_length + 1 - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"The prompt has {num_prompt_tokens} tokens, the model's context {context_length}: shorten it."
        )
    config.max_new_tokens = min(config.max_new_tokens or room, room)


class _WithinContext:
    def generate_streaming(self, model, processor, inputs, gen_config, **kwargs):
        fit_into_context(gen_config, model, _num_tokens(inputs))
        return super().generate_streaming(model, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]

    async def generate_non_streaming(self, model, processor, inputs, gen_config, **kwargs):
        fit_into_context(gen_config, model, _num_tokens(inputs))
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]


class GenerateManager(_WithinContext, utils.GenerateManager):  # type: ignore[misc]
    pass


class CBGenerateManager(_WithinContext, utils.CBGenerateManager):  # type: ignore[misc]
    pass


def _num_tokens(inputs: Any) -> int:
    ids = inputs["input_ids"]
    # continuous batching has a list, generate a tensor (1, T)
    return len(ids) if isinstance(ids, list) else ids.shape[-1]


def build_server(*args: Any, **kwargs: Any) -> Any:
    """transformers' app, which tells OpenAI's clients what is wrong with a request, in the form that they read."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    app = transformers_app(*args, **kwargs)

    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)

    @app.exception_handler(ValueError)
    async def impossible(request: Any, error: ValueError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(TemplateError)
    async def no_template(request: Any, error: TemplateError) -> JSONResponse:
        return answer(400, f"The model's chat template does not take these messages: {error}")

    @app.exception_handler(RequestValidationError)
    async def no_object(request: Any, error: RequestValidationError) -> JSONResponse:
        return answer(400, "The request's body must be a JSON object.")

    @app.exception_handler(HTTPException)
    async def refused(request: Any, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    return app


transformers_app = server.build_server


# Numbers of the command line; port 0 is any free one
SERVER_FLAGS = {
    "port": Range(least=0, most=65535),
    "default_seed": Range(least=0, most=2**32 - 1),
    **dict.fromkeys(("model_timeout", "cb_block_size", "cb_num_blocks", "cb_max_batch_tokens"), Range(least=1)),
    "cb_max_memory_percent": Range(above=0, most=1),
}


@functools.wraps(Serve)
def serve(*args: Any, **kwargs: Any) -> Serve:
    """`transformers serve`, which would find a wrong number once the model is loaded, or with the first request."""
    for name, allowed in SERVER_FLAGS.items():
        value = kwargs.get(name)
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"--{name.replace('_', '-')} {value} must be {allowed}.")
    return Serve(*args, **kwargs)


def main(argv: list[str] | None = None) -> None:
    """`python -m hf_minigpt`: the command line of `transformers serve`."""
    register()
    # where the command looks them up
    model_manager.ModelManager = ModelManager  # type: ignore[misc]
    utils.GenerateManager = GenerateManager  # type: ignore[misc]
    utils.CBGenerateManager = CBGenerateManager  # type: ignore[misc]
    utils.BaseHandler._validate_request = _validate_request  # type: ignore[method-assign, assignment]
    server.build_server = build_server
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.callback()(_check_installed)
    app.command(name="serve")(serve)
    app(argv)


def _check_installed() -> None:
    """A GPT that the Hugging Face ecosystem takes for one of its own."""
    if not is_serve_available():
        raise typer.BadParameter('serving needs more packages: pip install "hf_minigpt[serve]"')
