"""What known programs send, field by field, as their sources build it. Model names are those they have by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GENERATIONS, EDITS, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Body:
    """One request.

    Attributes:
        client: the program, and the part of it.
        form: the fields are sent as multipart/form-data, as text.
        files: the names of the parts that are pictures.
        answer: where the program looks for the picture: "url", "b64_json" or "chat".
    """

    client: str
    path: str
    fields: Mapping[str, Any]
    form: bool = False
    files: tuple[str, ...] = ()
    query: str = ""
    answer: str = "b64_json"
    streamed: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.client


_ASKED = {"role": "user", "content": "a cat on a sofa"}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42m"
    "Nk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

BODIES = (
    # Open WebUI: backend/open_webui/routers/images.py
    Body(
        client="Open WebUI, pictures, dall-e-2",
        path=GENERATIONS,
        fields={"model": "dall-e-2", "prompt": "a cat", "n": 1, "size": "512x512", "response_format": "b64_json"},
        headers={"X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-User-Role": "admin"},
    ),
    Body(
        client="Open WebUI, pictures, further parameters from its settings",
        path=GENERATIONS,
        query="?api-version=2025-04-01-preview",
        fields={
            "model": "gpt-image-1",
            "prompt": "a cat",
            "n": 1,
            "size": "auto",
            "quality": "high",
            "background": "opaque",
            "moderation": "low",
            "output_compression": 80,
        },
    ),
    Body(
        client="Open WebUI, edit of one picture",
        path=EDITS,
        form=True,
        files=("image",),
        fields={"model": "dall-e-2", "prompt": "snow", "n": "1", "size": "512x512", "response_format": "b64_json"},
    ),
    Body(
        client="Open WebUI, edit of two pictures",
        path=EDITS,
        form=True,
        files=("image[]", "image[]"),
        fields={"model": "gpt-image-1", "prompt": "snow", "n": "1", "background": "auto"},
    ),
    Body(
        client="Open WebUI, chat",
        path=CHAT,
        streamed=True,
        answer="chat",
        fields={
            "stream": True,
            "model": "omni-sp/shapes",
            "messages": [{"role": "system", "content": "You draw."}, _ASKED],
            "temperature": 0.8,
            "top_p": 0.9,
            "min_p": 0.05,
            "max_tokens": 128,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": 42,
            "stop": ["\n"],
            "logit_bias": {"5432": 100},
            "top_k": 40,
            "repetition_penalty": 1.1,
            "reasoning_effort": "medium",
            "stream_options": {"include_usage": True},
            "tools": [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}],
            "tool_choice": "auto",
        },
    ),
    # LibreChat: api/app/clients/tools/structured/OpenAIImageTools.js, DALLE3.js
    Body(
        client="LibreChat, image_gen_oai",
        path=GENERATIONS,
        fields={
            "model": "gpt-image-1",
            "prompt": "a cat",
            "n": 1,
            "background": "auto",
            "output_format": "png",
            "quality": "auto",
            "size": "auto",
        },
    ),
    Body(
        client="LibreChat, image_gen_oai, as WebP",
        path=GENERATIONS,
        fields={
            "model": "gpt-image-1",
            "prompt": "a cat",
            "n": 1,
            "background": "opaque",
            "output_format": "webp",
            "output_compression": 100,
            "quality": "medium",
            "size": "1536x1024",
        },
    ),
    Body(
        client="LibreChat, image_edit_oai",
        path=EDITS,
        form=True,
        files=("image[]",),
        fields={"model": "gpt-image-1", "prompt": "snow", "quality": "auto", "size": "auto"},
    ),
    Body(
        client="LibreChat, dalle",
        path=GENERATIONS,
        answer="url",
        fields={
            "model": "dall-e-3",
            "quality": "hd",
            "style": "vivid",
            "size": "1792x1024",
            "prompt": "a cat",
            "n": 1,
        },
    ),
    Body(
        client="LibreChat, chat",
        path=CHAT,
        streamed=True,
        answer="chat",
        fields={
            "model": "omni-sp/shapes",
            "user": "66b2a1",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 1,
            "top_p": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}],
        },
    ),
    # LiteLLM: litellm/llms/openai/image_generation, litellm/llms/openai/image_edit
    Body(
        client="LiteLLM, image_generation, gpt-image",
        path=GENERATIONS,
        fields={
            "model": "gpt-image-1",
            "prompt": "a cat",
            "n": 1,
            "size": "1024x1536",
            "quality": "low",
            "background": "auto",
            "moderation": "auto",
            "output_format": "jpeg",
            "output_compression": 70,
            "user": "team-1",
        },
    ),
    Body(
        client="LiteLLM, image_generation, dall-e-3",
        path=GENERATIONS,
        fields={
            "model": "dall-e-3",
            "prompt": "a cat",
            "n": 1,
            "size": "1024x1024",
            "quality": "standard",
            "response_format": "b64_json",
            "style": "natural",
            "user": "team-1",
        },
    ),
    Body(
        client="LiteLLM, image_generation, with extra_body left in",
        path=GENERATIONS,
        fields={
            "model": "gpt-image-1",
            "prompt": "a cat",
            "extra_body": {"response_format": "b64_json", "seed": "7"},
        },
    ),
    Body(
        client="LiteLLM, image_edit",
        path=EDITS,
        form=True,
        files=("image[]",),
        fields={
            "model": "gpt-image-1",
            "prompt": "snow",
            "n": "1",
            "quality": "high",
            "size": "1024x1024",
            "input_fidelity": "high",
            "user": "team-1",
            "stream": "false",
        },
    ),
    Body(
        client="LiteLLM, completion",
        path=CHAT,
        answer="chat",
        fields={
            "model": "omni-sp/shapes",
            "messages": [_ASKED],
            "n": 1,
            "temperature": 0,
            "max_completion_tokens": 512,
            "metadata": {"trace": "1"},
            "service_tier": "auto",
            "parallel_tool_calls": True,
            "logprobs": False,
            "response_format": {"type": "text"},
            "modalities": ["image", "text"],
            "store": False,
        },
    ),
    # n8n: packages/@n8n/nodes-langchain/nodes/vendors/OpenAi; numbers of an expression come as text
    Body(
        client="n8n, generate, dall-e-3 as files",
        path=GENERATIONS,
        fields={
            "prompt": "a cat",
            "model": "dall-e-3",
            "response_format": "b64_json",
            "quality": "hd",
            "size": "1024x1792",
            "style": "natural",
        },
    ),
    Body(
        client="n8n, generate, dall-e-2 as URLs",
        path=GENERATIONS,
        answer="url",
        fields={"prompt": "a cat", "model": "dall-e-2", "response_format": "url", "n": "2", "size": "256x256"},
    ),
    Body(
        client="n8n, generate, gpt-image-1",
        path=GENERATIONS,
        fields={"prompt": "a cat", "model": "gpt-image-1", "quality": "medium", "size": "1536x1024"},
    ),
    Body(
        client="n8n, edit",
        path=EDITS,
        form=True,
        files=("image[]", "image[]"),
        fields={
            "prompt": "snow",
            "model": "gpt-image-1",
            "n": "1",
            "size": "1536x1024",
            "quality": "high",
            "background": "opaque",
            "input_fidelity": "high",
            "output_format": "webp",
            "output_compression": "85",
            "user": "test-user-123",
        },
    ),
    Body(
        client="n8n, edit, compression of a PNG",
        path=EDITS,
        form=True,
        files=("image[]",),
        fields={
            "prompt": "snow",
            "model": "gpt-image-1",
            "n": "1",
            "size": "1024x1024",
            "quality": "auto",
            "output_compression": "0",
        },
    ),
    Body(
        client="n8n, chat model",
        path=CHAT,
        answer="chat",
        fields={
            "model": "omni-sp/shapes",
            "temperature": 0.7,
            "top_p": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "n": 1,
            "stream": False,
            "max_tokens": -1,
            "messages": [{"role": "user", "content": "a cat"}],
        },
    ),
    Body(
        client="a picture in a chat, with its detail",
        path=CHAT,
        answer="chat",
        files=("chat",),
        fields={
            "model": "omni-sp/shapes",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "make it snow"},
                        {"type": "image_url", "image_url": {"url": _PIXEL, "detail": "auto"}},
                    ],
                }
            ],
        },
    ),
    # vLLM-Omni's examples with curl
    Body(
        client="vLLM-Omni, chat with extra_body",
        path=CHAT,
        answer="chat",
        fields={
            "messages": [_ASKED],
            "extra_body": {
                "height": 512,
                "width": 512,
                "num_inference_steps": 4,
                "true_cfg_scale": None,
                "seed": 42,
                "num_outputs_per_prompt": 1,
            },
        },
    ),
)
