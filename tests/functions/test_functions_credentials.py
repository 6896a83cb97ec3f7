"""The functions' token: from a file that somebody else refreshes, or from a setting."""

import os
import stat
from pathlib import Path

import pytest
from function_apps import ask, in_process, serving

from rejoinder.worker.engines.functions.credentials import SETTLED_NANOSECONDS, VARIABLE, Token
from rejoinder.worker.errors import EngineGone, Failed, RetryableError

TELLING = f"""
    import os
    at_import = os.environ.get("{VARIABLE}")

    @init
    def load(context): return context.get_token()
    @generate
    def one(body, state, context):
        return [state, context.get_token(), context.generate_token(), context.get_headers()["Authorization"], at_import]
"""


def long_ago(path, hours=1):
    """A file that was written when no clock tick can matter any more."""
    then = path.stat().st_mtime_ns - hours * 3600 * 10**9
    os.utime(path, ns=(then, then))


async def test_a_file_is_read_again_when_it_changes(tmp_path):
    file = tmp_path / "token"
    file.write_text("first\n")
    async with serving(tmp_path, TELLING, token_file=str(file)) as engine:
        assert os.environ[VARIABLE] == str(file)
        assert await ask(engine) == ["first", "first", "first", "Bearer first", str(file)]
        file.write_text("second")  # in place
        assert (await ask(engine))[1] == "second"
        other = tmp_path / "other"
        other.write_text("third!")
        other.replace(file)  # by an atomic rename; of the same length
        assert (await ask(engine))[1] == "third!"
    assert VARIABLE not in os.environ


def test_one_that_has_not_changed_is_not_read_again(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("first")
    long_ago(file)
    token = Token(file)
    reads = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda *args, **kw: reads.append(1) or read(*args, **kw))
    assert [token(), token()] == ["first", "first"]
    assert not reads
    file.write_text("again")
    assert [token(), token()] == ["again", "again"]
    assert reads == [1, 1]  # so fresh that another change could look the same
    long_ago(file, hours=2)
    assert [token(), token()] == ["again", "again"]
    assert len(reads) == 3
    assert SETTLED_NANOSECONDS > 10**9


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff\xfe"])
async def test_a_file_without_a_token_is_a_retryable_error_later_and_no_start(tmp_path, content, capsys):
    file = tmp_path / "token"
    file.write_text("first")
    async with serving(tmp_path, TELLING, token_file=str(file)) as engine:
        file.write_bytes(content)
        with pytest.raises(RetryableError, match="token_file") as caught:
            await ask(engine)
        assert str(tmp_path) not in caught.value.message  # the sender reads it
        assert str(file) in capsys.readouterr().out  # of the log
        file.unlink()
        with pytest.raises(RetryableError, match="No such file"):
            await ask(engine)
        file.write_text("back")
        assert (await ask(engine))[1] == "back"
    file.write_bytes(content)
    with pytest.raises(EngineGone, match="token_file"):
        async with serving(tmp_path, TELLING, token_file=str(file)):
            pass
    file.unlink()
    with pytest.raises(EngineGone, match="No such file"):
        async with serving(tmp_path, TELLING, token_file=str(file)):
            pass


async def test_a_token_from_the_settings_has_a_private_file(tmp_path):
    source = f"""
        import os, pathlib
        @generate
        def one(body, context):
            file = pathlib.Path(os.environ["{VARIABLE}"])
            return [file, file.read_text(), file.read_text(), file.stat().st_mode, context.get_token()]
    """
    async with serving(tmp_path, source, token="of-mine") as engine:
        file, first, again, mode, token = await ask(engine)
        assert (first, again, token) == ("of-mine", "of-mine", "of-mine")
        assert stat.S_IMODE(mode) == 0o600
        assert Path(file).is_absolute()
    with pytest.raises(OSError, match="No such file"):
        Path(file).read_text()
    async with in_process(tmp_path, source, token="other") as engine:
        file, first, *_ = await ask(engine)
        assert first == "other"
        assert VARIABLE not in os.environ
    assert not Path(file).exists()


async def test_without_one_the_log_says_what_to_set(tmp_path, capsys):
    source = """
        @generate
        def one(body, context): return context.get_token() if body else context.get_headers()
    """
    async with serving(tmp_path, source) as engine:
        assert "Authorization" not in await ask(engine)
        with pytest.raises(Failed, match=r"^the function failed: RuntimeError$"):
            await ask(engine, 1)
    assert "--token-file" in capsys.readouterr().out
