"""Credentials that expire: those of a role are renewed as they do, others are not, and what is waited for."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from aiohttp import web
from aws_stand_in import Refusal

from rejoinder.adapters import Denied, Transient, open_subscription

QUEUE = "awssqs:///q"


@pytest.fixture
def issued(monkeypatch, tmp_path, stand_in):
    """What a process gives as credentials, here the text of a file: `issued(key)` is a pair of 5 minutes."""
    file = tmp_path / "credentials.json"
    (tmp_path / "config").write_text(f"[default]\nregion=us-east-1\ncredential_process=cat {file}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")

    def issue(key):
        end = datetime.now(UTC) + timedelta(minutes=5)
        fields = {"AccessKeyId": key, "SecretAccessKey": "s", "SessionToken": "t", "Expiration": end.isoformat()}
        file.write_text(json.dumps({"Version": 1, **fields} if key else {}))

    return issue


async def test_they_are_renewed_before_they_expire(stand_in, issued):
    used = []

    def receive(_fields):
        async def answer(request):
            used.append(request.headers["Authorization"].partition("Credential=")[2].partition("/")[0])
            return web.Response(text="{}", content_type="application/x-amz-json-1.0")

        return answer

    stand_in.on["ReceiveMessage"] = receive
    issued("first")
    async with open_subscription(QUEUE) as subscription:
        await subscription.receive(1, 0)
        issued("second")
        await subscription.receive(1, 0)
        issued(None)  # whoever gives them has none to give: for now, as far as one can know
        with pytest.raises(Transient, match=r"sqs:ReceiveMessage on .*CredentialRetrievalError"):
            await subscription.receive(1, 0)
        issued("third")
        await subscription.receive(1, 0)
    assert used == ["first", "second", "third"]


@pytest.mark.parametrize("code", ["ExpiredToken", "ExpiredTokenException"])
async def test_only_those_that_are_renewed_are_worth_waiting_for(monkeypatch, stand_in, issued, code):
    def refuse(_fields):
        raise Refusal(code, 403)

    stand_in.on["ReceiveMessage"] = refuse
    issued("a")
    async with open_subscription(QUEUE) as subscription:
        with pytest.raises(Transient, match=code):
            await subscription.receive(1, 0)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "static")
    async with open_subscription(QUEUE) as subscription:
        with pytest.raises(Denied, match=code):
            await subscription.receive(1, 0)


@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "InvalidSignatureException"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "Signature expired: 20261122T010000Z is now earlier than 20261122T020000Z (20261122T021500Z - 15 min.)",
            Transient,
        ),
        ("Signature not yet current: 20261122T020000Z is still later than 20261122T010500Z", Transient),
        ("The request signature we calculated does not match the signature you provided.", Denied),
    ],
)
async def test_a_clock_that_is_wrong_gets_set(stand_in, code, text, kind):
    def refuse(_fields):
        raise Refusal(code, 403, text)

    stand_in.on["ReceiveMessage"] = refuse
    async with open_subscription(QUEUE) as subscription:
        with pytest.raises(kind, match=text[:20]):
            await subscription.receive(1, 0)
