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
that leaves no room in the model's context. A text ends where the context does, with `finish_reason="length"`.
"""

from typing import Any

import typer
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.utils.import_utils import is_serve_available

from .registration import register


class ModelManager(model_manager.ModelManager):
    """Says at the start what will not work, and lists the model that is served rather than the Hub's cache."""

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        tokenizer = super()._load_processor(*args, **kwargs)
        if tokenizer.chat_template is None:
            print("The tokenizer has no chat template: /v1/completions answers, chat does not.", flush=True)
        return tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        model = super()._load_model(model_id_and_revision, *args, **kwargs)
        if not isinstance(model, GenerationMixin):
            raise ValueError(f"{model_id_and_revision} is a {type(model).__name__}, which writes no text to serve.")
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        if self.force_model is None:
            return super().get_gen_models(cache_dir)
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


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
    from fastapi.responses import JSONResponse

    app = transformers_app(*args, **kwargs)

    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)

    @app.exception_handler(ValueError)
    async def impossible(request: Any, error: ValueError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Any, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    return app


transformers_app = server.build_server


def main(argv: list[str] | None = None) -> None:
    """`python -m hf_minigpt`: the command line of `transformers serve`."""
    register()
    # where the command looks them up
    model_manager.ModelManager = ModelManager  # type: ignore[misc]
    utils.GenerateManager = GenerateManager  # type: ignore[misc]
    utils.CBGenerateManager = CBGenerateManager  # type: ignore[misc]
    server.build_server = build_server
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.callback()(_check_installed)
    app.command(name="serve")(Serve)
    app(argv)


def _check_installed() -> None:
    """A GPT that the Hugging Face ecosystem takes for one of its own."""
    if not is_serve_available():
        raise typer.BadParameter('serving needs more packages: pip install "hf_minigpt[serve]"')
