r"""An AI service as for watsonx.ai, unchanged: addresses and telephone numbers become pseudonyms.

The same address has the same pseudonym as long as the deployment's token is the same, and without the token nobody can
tell whose it is. Three ways to ask: `generate` (one text, as JSON or as text/plain), `generate_stream` (a sentence at a
time), and `generate_batch` (a job: a file of JSON lines below the deployment's folder, into another one). Nothing here
imports rejoinder.

    mkdir texts && echo '{"text": "ann@example.com wrote"}' > texts/in.jsonl && echo secret > token
    rejoinder worker --app-dir examples --app watsonx_service:pseudonyms --default-path /pseudonyms \
        --app-params '{"folder": "texts"}' --token-file token \
        --requests 'sqlite:///work.db?queue=requests' --responses 'sqlite:///work.db?queue=responses' &
    rejoinder publish --requests 'sqlite:///work.db?queue=requests' examples/watsonx_service.jsonl
    rejoinder join examples/watsonx_service.jsonl 'sqlite:///work.db?queue=responses'
"""

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PERSONAL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\+\d[\d ()-]{6,}\d")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def pseudonyms(context: Any, folder: str = ".") -> tuple[Callable[..., Any], ...]:
    """The service: called once in each process; what it returns answers.

    Args:
        context: The deployment's; each call has one of its own.
        folder: From the deployment's custom object (`--app-params`): where jobs find their files.
    """
    root = Path(folder).resolve()

    def without(text: str, token: str) -> str:
        def pseudonym(found: re.Match[str]) -> str:
            return "<" + hmac.new(token.encode(), found[0].encode(), hashlib.sha256).hexdigest()[:8] + ">"

        return PERSONAL.sub(pseudonym, text)

    def text_of(context: Any) -> str:
        if context.get_headers().get("Content-Type", "").startswith("text/plain"):
            return str(context.get_bytes().decode())
        return str(context.get_json()["text"])

    def generate(context: Any) -> dict[str, Any]:
        text = without(text_of(context), context.get_token())
        return {"headers": {"Content-Type": "application/json"}, "body": {"text": text}}

    def generate_stream(context: Any) -> Iterator[dict[str, str]]:
        token = context.get_token()
        for sentence in SENTENCE_END.split(text_of(context)):
            yield {"text": without(sentence, token)}

    def generate_batch(input_data_references: list[dict[str, Any]], output_data_reference: dict[str, Any]) -> None:
        token = context.get_token()
        with below(root, output_data_reference).open("w") as out:
            for reference in input_data_references:
                with below(root, reference).open() as lines:
                    out.writelines(
                        json.dumps({"text": without(json.loads(line)["text"], token)}) + "\n" for line in lines
                    )

    return generate, generate_stream, generate_batch


def below(root: Path, reference: dict[str, Any]) -> Path:
    """The file that a data reference names, which whoever sends requests must not choose outside of the folder.

    Raises:
        PermissionError: it is outside.
    """
    path = (root / str(reference["location"]["path"])).resolve()
    if not path.is_relative_to(root):
        raise PermissionError(f"{path} is not below {root}")
    return path
