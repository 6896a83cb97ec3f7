"""SIGKILL while a result is stored, and between that and its publishing: one object, one answer, nothing dangling.

REJOINDER_TEST_KILLS says how many kills of each kind; 4 by default.
"""

from pathlib import Path

import pytest
from proxy import Proxy
from store_kills import KILLS, LARGE, PARTS, Files, Killing, bucket, kill_before_publishing, kill_during_upload

pytestmark = pytest.mark.timeout(300 + 20 * KILLS)


async def test_kills_during_an_upload_to_files(tmp_path: Path) -> None:
    await kill_during_upload(Killing(Files(tmp_path / "store"), tmp_path, LARGE), KILLS)


async def test_kills_between_a_file_and_its_response(tmp_path: Path) -> None:
    await kill_before_publishing(Killing(Files(tmp_path / "store"), tmp_path, 100_000), KILLS)


async def test_kills_between_the_ledger_and_its_response(tmp_path: Path) -> None:
    ledger = ["--ledger", f"file://{tmp_path}/ledger"]
    killing = Killing(Files(tmp_path / "store"), tmp_path, 100_000, *ledger)
    await kill_before_publishing(killing, KILLS)
    assert len(list((tmp_path / "ledger").iterdir())) == KILLS


async def test_kills_during_an_upload_to_s3(aws: str, tmp_path: Path) -> None:
    async with bucket() as store:
        with Proxy(aws) as proxy:
            proxy.delay(0.01)  # each 64 KiB: an upload takes longer than the test needs to see it
            env = {"AWS_ENDPOINT_URL_S3": proxy.url}
            await kill_during_upload(Killing(store, tmp_path, PARTS, env=env), KILLS)


@pytest.mark.usefixtures("aws")
async def test_kills_between_an_object_on_s3_and_its_response(tmp_path: Path) -> None:
    async with bucket() as store:
        await kill_before_publishing(Killing(store, tmp_path, 100_000), KILLS)
