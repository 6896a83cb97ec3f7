"""The examples without a model: each in a real worker process, by the commands of its header."""

import hashlib
import hmac
import json
import os
import sqlite3

from examples_harness import Example


def pseudonym(token: str, address: str) -> str:
    return "<" + hmac.new(token.encode(), address.encode(), hashlib.sha256).hexdigest()[:8] + ">"


def test_a_watsonx_service(tmp_path) -> None:
    example = Example("watsonx_service", tmp_path)
    ann, bob = pseudonym("secret", "ann@example.com"), pseudonym("secret", "bob@example.com")
    number = pseudonym("secret", "+44 20 7946 0958")
    with example.worker() as process:
        got = example.asked()
        assert {response["status_code"] for response in got.values()} == {200}
        assert got["json"]["body"] == {"text": f"Write to {ann}, or call {number}."}
        assert got["json"]["headers"] == {"Content-Type": "application/json"}
        assert got["text"]["body"] == {"text": ann}
        assert got["stream"]["body"] == [{"text": f"Ann is {ann}."}, {"text": f"Bob is {bob}."}]
        assert got["job"]["body"] is None
        assert json.loads((tmp_path / "texts" / "out.jsonl").read_text()) == {"text": f"{ann} wrote"}

        (tmp_path / "fresh").write_text("second")
        (tmp_path / "fresh").replace(tmp_path / "token")
        job = {"input_data_references": [{"location": {"path": "../token"}}]}
        job |= {"output_data_reference": {"location": {"path": "stolen"}}}
        got = example.answers(
            {"metadata": {"id": "renewed"}, "body": {"text": "ann@example.com"}},
            {"metadata": {"id": "outside"}, "path": "/ml/v4/deployments_jobs", "body": job},
        )
        assert got["renewed"]["body"] == {"text": pseudonym("second", "ann@example.com")}
        assert got["outside"]["status_code"] == 500
        assert "PermissionError" in got["outside"]["body"]["error"]["message"]
        assert str(tmp_path) not in json.dumps(got["outside"]), "that is for the log alone"
        assert process.stop() == 0
    assert "is not below" in process.log.read_text()


def test_a_batch_function(tmp_path) -> None:
    example = Example("batch_function", tmp_path)
    with example.worker() as process:
        got = example.asked()
        assert got[1] == {"status_code": 200, "metadata": {"id": 1}, "body": {"article": "chair", "cents": 19600}}
        assert got[2]["body"] == {"article": "chair", "cents": 22000}
        assert got[3]["status_code"] == 400
        error = {"message": "no lamp is sold in eu", "type": "invalid_request_error", "param": "article", "code": None}
        assert got[3]["body"] == {"error": error}
        assert got[4]["body"] == {"article": "lamp", "cents": 2500}
        assert got[5]["status_code"] == 400
        assert got[5]["body"]["error"]["param"] == "quantity"

        replacing = sqlite3.connect(tmp_path / "prices.db", isolation_level=None)
        replacing.execute("BEGIN EXCLUSIVE")
        numbers = range(1, 201)
        file = example.publish(
            *[
                {"metadata": {"id": n}, "path": "/quote", "body": {"catalogue": "us", "article": "lamp", "quantity": n}}
                for n in numbers
            ]
        )
        process.until_event("request_retried")
        replacing.execute("UPDATE prices SET cents = 3000 WHERE article = 'lamp'")
        replacing.execute("COMMIT")
        replacing.close()
        got = example.joined(file)
        assert [got[number]["body"]["cents"] for number in numbers] == [3000 * number for number in numbers]
        assert process.stop() == 0


def test_a_worker_without_what_init_needs_does_not_start(tmp_path) -> None:
    example = Example("batch_function", tmp_path)
    with example.worker("--app-params", '{"database": "nowhere.db"}') as process:
        assert process.process.wait(60) == 1
    assert "nowhere.db: make it with python examples/batch_function.py" in process.log.read_text()


def test_the_worker_itself_imports_no_app(tmp_path) -> None:
    """The user's module is imported in the processes of the app alone: it may bring gigabytes."""
    (tmp_path / "who.py").write_text(
        "import os\nfrom rejoinder.worker.functions import generate\n"
        "@generate('/who')\ndef who(body):\n    return os.getpid()\n"
    )
    example = Example("batch_function", tmp_path)
    with example.worker("--app", "who", "--app-dir", str(tmp_path)) as process:
        pid = example.answers({"metadata": {"id": 1}, "path": "/who", "body": None})[1]["body"]
        assert pid != process.process.pid
        os.kill(pid, 0)
        assert process.stop() == 0
