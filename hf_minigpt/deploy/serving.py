"""Serve a MiniGPT with `transformers serve`: OpenAI's chat completions, completions and responses.

    pip install "hf_minigpt[serve]"
    hf-minigpt serve runs/sft
    hf-minigpt serve you/your-minigpt --continuous-batching --port 8080

`transformers serve` has no plug-ins. This command registers MiniGPT and then runs it, with the same flags (`--help`).
Clients of OpenAI's API use the name of the model as given on the command line:

    from openai import OpenAI

    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "Who lives in the mill?"}]
    reply = client.chat.completions.create(model="runs/sft", messages=messages)

Chat requires a tokenizer with a chat template, which recipes/sft.py adds. Without one, only `/v1/completions` works. A
wrong request, such as a prompt longer than the context, gets status 400. Generation stops at the end of the context,
with `finish_reason="length"`. A LoRA adapter is merged into its base model.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import transformers
import typer
from packaging import version
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.utils.import_utils import is_serve_available

from .. import adapters
from ..flags import Range
from ..registration import register


class ModelManager(model_manager.ModelManager):
    """A model manager that merges adapters, and reports at the start what cannot be served."""

    def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        with _merged(model_id_and_revision, self.trust_remote_code) as name:
            tokenizer = super()._load_processor(name, *args, **kwargs)
        if tokenizer.chat_template is None:
            print("The tokenizer has no chat template: only /v1/completions works.", flush=True)
        return tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        with _merged(model_id_and_revision, self.trust_remote_code) as name:
            model = super()._load_model(name, *args, **kwargs)
        if not isinstance(model, GenerationMixin):
            raise ValueError(
                f"{model_id_and_revision} is a {type(model).__name__}, which cannot generate text. Use another model."
            )
        return model

    if version.parse(transformers.__version__) < version.parse("5.24"):
        # List the served model instead of the Hub's cache. Delete this when transformers>=5.24 is required.
        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
            if self.force_model is None:
                return super().get_gen_models(cache_dir)
            return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


@contextlib.contextmanager
def _merged(model_id_and_revision: str, trust_remote_code: bool) -> Iterator[str]:
    """Yield a model's name with its revision; for an adapter, a temporary folder with the merged model."""
    # transformers before 5.24 appends "@main" to local paths. Delete this when transformers>=5.24 is required: it has
    # `split_revision`.
    is_path = os.path.exists(model_id_and_revision) or "@" not in model_id_and_revision
    name, at, revision = (model_id_and_revision, "", "") if is_path else model_id_and_revision.rpartition("@")
    with adapters.merged(name, trust_remote_code=trust_remote_code) as folder:
        yield f"{folder}{at}{revision}"


ROLES = ("system", "user", "assistant", "tool")
NUMBER_FIELDS = ("temperature", "top_p", "frequency_penalty", "seed")
COUNT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def check_request(body: dict[str, Any]) -> None:
    """
    Check the fields of a request that transformers does not check, and rename the role "developer" to "system".

    Args:
        body: the request's JSON object, changed in place.

    Raises:
        ValueError: a field has a wrong value. The message names both and the allowed values.
    """
    _check_text(body, "")
    for field in (*NUMBER_FIELDS, *COUNT_FIELDS):
        value = body.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{field}={_show(value)} must be a number. Set a number or remove the field.")
        if field in COUNT_FIELDS and value is not None and value < 1:
            raise ValueError(f"{field}={value} must be at least 1.")
    if not isinstance(body.get("model", ""), str | None):
        raise ValueError(f"model={_show(body['model'])} must be a string. Use a name from /v1/models.")
    if "messages" in body:
        _check_messages(body["messages"], "messages")
    elif isinstance(body.get("input"), list):
        items = body["input"]
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("input must be a string or a list of objects.")
        # Tool calls and their results have no role.
        messages = [item for item in items if "role" in item]
        if messages:
            _check_messages(messages, "input")


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
            # OpenAI's newer name for the role, which few chat templates support
            message["role"] = "system"
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}.role={_show(message.get('role'))} must be one of {', '.join(ROLES)}.")
        content = message.get("content")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls={_show(calls)} must be a list.")
        is_text = isinstance(content, str) or (content is None and calls)
        if not is_text and not (isinstance(content, list) and all(map(_is_content_part, content))):
            raise ValueError(
                f"{where}.content={_show(content)} must be a string, or a list of parts such as "
                '{"type": "text", "text": "Hello"}.'
            )


def _is_content_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return not part["type"].endswith("text") or isinstance(part.get("text"), str)


def _check_text(value: Any, where: str) -> None:
    """Raise a ValueError if any string has an unpaired surrogate, which no tokenizer accepts."""
    if isinstance(value, str):
        for character in value:
            if "\ud800" <= character <= "\udfff":
                raise ValueError(
                    f"{where} has U+{ord(character):04X}, half of a surrogate pair, which is not a character. Send "
                    "both halves or remove it."
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
    _transformers_validate_request(handler, body)
    known = getattr(handler._valid_params_class, "__mutable_keys__", ())
    for field in ("messages", "input"):
        if field in known and body.get(field) is None:
            raise ValueError(f"{field} is missing. Set it to the text that the model answers.")
    check_request(body)


_transformers_validate_request = utils.BaseHandler._validate_request


def fit_into_context(config: GenerationConfig, model: PreTrainedModel, num_prompt_tokens: int) -> None:
    """
    Reduce `config.max_new_tokens`, by default 1024, to the room that the prompt leaves in the context.

    Raises:
        ValueError: the prompt is empty, or as long as the context.
    """
    if num_prompt_tokens == 0:
        raise ValueError("The prompt is empty. Set it to the text to continue.")
    # Without MODEL the server loads any model that a request names, and some have no longest context.
    context_length = getattr(model.config, "max_position_embeddings", None)
    if context_length is None:
        return
    # The last generated token is never an input.
    room = context_length + 1 - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"The prompt of {num_prompt_tokens} tokens exceeds the model's context of {context_length}. Shorten it."
        )
    config.max_new_tokens = min(config.max_new_tokens or room, room)


class _FitIntoContext:
    """Limit every generation to the model's context."""

    def generate_streaming(self, model, processor, inputs, gen_config, **kwargs):
        fit_into_context(gen_config, model, _num_tokens(inputs))
        return super().generate_streaming(model, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]

    async def generate_non_streaming(self, model, processor, inputs, gen_config, **kwargs):
        fit_into_context(gen_config, model, _num_tokens(inputs))
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **kwargs)  # type: ignore[misc]


class GenerateManager(_FitIntoContext, utils.GenerateManager):  # type: ignore[misc]
    pass


class CBGenerateManager(_FitIntoContext, utils.CBGenerateManager):  # type: ignore[misc]
    pass


def _num_tokens(inputs: Any) -> int:
    ids = inputs["input_ids"]
    # A list with continuous batching, else a tensor (1, T)
    return len(ids) if isinstance(ids, list) else ids.shape[-1]


def build_server(*args: Any, **kwargs: Any) -> Any:
    """Return transformers' app, with errors in the format of OpenAI's clients."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    app = transformers_app(*args, **kwargs)

    def error_response(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)

    @app.exception_handler(ValueError)
    async def wrong_value(request: Any, error: ValueError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(TemplateError)
    async def template_error(request: Any, error: TemplateError) -> JSONResponse:
        return error_response(400, f"The model's chat template rejects these messages: {error}")

    @app.exception_handler(RequestValidationError)
    async def not_an_object(request: Any, error: RequestValidationError) -> JSONResponse:
        return error_response(400, "The request's body must be a JSON object.")

    @app.exception_handler(HTTPException)
    async def http_error(request: Any, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    return app


transformers_app = server.build_server


# Numbers on the command line; port 0 is any free port
SERVER_FLAGS = {
    "port": Range(least=0, most=65535),
    "default_seed": Range(least=0, most=2**32 - 1),
    **dict.fromkeys(("model_timeout", "cb_block_size", "cb_num_blocks", "cb_max_batch_tokens"), Range(least=1)),
    "cb_max_memory_percent": Range(above=0, most=1),
}


@functools.wraps(Serve)
def serve(*args: Any, **kwargs: Any) -> Serve:
    """Check the flags, then run `transformers serve`, which would report them only after loading the model."""
    if not is_serve_available():
        raise typer.BadParameter('Serving requires more packages. Run: pip install "hf_minigpt[serve]"')
    for name, allowed in SERVER_FLAGS.items():
        value = kwargs.get(name)
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"--{name.replace('_', '-')} {value} must be {allowed}.")
    return Serve(*args, **kwargs)


def main(argv: list[str] | None = None) -> None:
    """
    Run the command line of `transformers serve`.

    Args:
        argv: flags; defaults to `sys.argv[1:]`.
    """
    register()
    # `Serve` looks these names up when it starts.
    model_manager.ModelManager = ModelManager  # type: ignore[misc]
    utils.GenerateManager = GenerateManager  # type: ignore[misc]
    utils.CBGenerateManager = CBGenerateManager  # type: ignore[misc]
    utils.BaseHandler._validate_request = _validate_request  # type: ignore[method-assign, assignment]
    server.build_server = build_server
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(serve)
    app(argv, prog_name="hf-minigpt serve")
