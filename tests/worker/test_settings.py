"""Where a setting's value comes from, and what is said of one that cannot be."""

from pathlib import Path

import pytest

from rejoinder.worker.engines.factory import transformers_config
from rejoinder.worker.engines.transformers.settings import TransformersSettings
from rejoinder.worker.settings import Settings, SettingsError, resolve, user_cache_dir

GIVEN = {"requests": "memory://a", "responses": "memory://b", "engine": "echo"}
MODEL = {"engine": "transformers", "model": "x"}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    config = tmp_path / "it.toml"
    config.write_text("max_attempts = 7\nretry_delay_seconds = 3\ngrace_seconds = 4\n")
    environ = {"REJOINDER_RETRY_DELAY_SECONDS": "5", "REJOINDER_GRACE_SECONDS": "6", "REJOINDER_SERVICE_HOST": "x"}
    resolved = resolve({**GIVEN, "grace_seconds": 9.0, "prefetch": None}, environ, config)
    settings, origins = resolved.settings, resolved.origins
    assert (settings.max_attempts, origins["max_attempts"]) == (7, str(config))
    assert (settings.retry_delay_seconds, origins["retry_delay_seconds"]) == (5.0, "REJOINDER_RETRY_DELAY_SECONDS")
    assert (settings.grace_seconds, origins["grace_seconds"]) == (9.0, "flag")
    assert (settings.prefetch, origins["prefetch"]) == (None, "default")


def test_a_file_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(GIVEN, {}).settings.max_attempts == 5
    (tmp_path / "rejoinder.toml").write_text('max_attempts = 9\nserved_model_name = ["a", "b"]\n')
    resolved = resolve({**GIVEN, **MODEL}, {})
    assert resolved.settings.max_attempts == 9
    assert resolved.settings.served_model_name == ["a", "b"]
    assert resolved.origins["max_attempts"] == "rejoinder.toml"


def test_lists_and_booleans_are_read_from_the_environment() -> None:
    environ = {"REJOINDER_SERVED_MODEL_NAME": "a, b", "REJOINDER_ENGINE_PROCESS": "false"}
    settings = resolve({**GIVEN, **MODEL}, environ).settings
    assert settings.served_model_name == ["a", "b"]
    assert settings.engine_process is False


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"requests": None}, {}, "requests is missing: give --requests or REJOINDER_REQUESTS"),
        ({"max_attempts": 0}, {}, "max_attempts .from flag. is 0: it should be greater than or equal to 1"),
        ({}, {"REJOINDER_MAX_ATTEMPTS": "many"}, "max_attempts .from REJOINDER_MAX_ATTEMPTS. is 'many'"),
        ({"engine": "auto"}, {}, "model is missing"),
        ({"model": "x"}, {}, "model has no meaning with engine echo"),
        ({"default_path": "x"}, {}, "default_path"),
        ({"engine_processes": 2}, {}, "engine_processes has no meaning with engine echo"),
        ({"lora": "x", "dtype": "auto"}, {}, "dtype, lora has no meaning with engine echo, which has no model"),
        ({}, {"REJOINDER_MAX_RUNNING": "3"}, "max_running has no meaning with engine echo"),
        ({**MODEL, "max_model_len": 1}, {}, "max_model_len .from flag. is 1: it should be greater than or equal to 2"),
        ({**MODEL, "engine_process": False, "engine_hang_seconds": 9.0}, {}, "engine_hang_seconds has no .* without"),
        ({**MODEL, "task": "embed", "batching": "static"}, {}, "batching has no meaning for task embed"),
        ({**MODEL, "task": "rerank", "cache_bytes": 9}, {}, "cache_bytes has no meaning for task rerank"),
        ({**MODEL, "task": "rerank", "pooling": "cls"}, {}, "pooling has no meaning for task rerank"),
        ({**MODEL, "task": "generate", "normalize": False}, {}, "normalize has no meaning for task generate"),
        ({**MODEL, "batching": "static", "cuda_graphs": True}, {}, "batching is static, but cuda_graphs is set"),
        ({**MODEL, "batching": "static", "compile": "max"}, {}, "compile is set, which only continuous batching has"),
        ({"devices": "cpu"}, {}, "devices has no meaning with engine echo"),
        ({**MODEL, "devices": ","}, {}, "devices is empty: name at least one, such as cuda:0,cuda:1"),
        ({**MODEL, "devices": "cuda:1,cuda,cuda:0"}, {}, "devices names cuda:0 twice: .* take engine_processes"),
        ({**MODEL, "devices": "auto,cpu"}, {}, "auto is none"),
        ({**MODEL, "devices": "cpu", "device": "cpu"}, {}, "devices and device exclude each other"),
        ({**MODEL, "devices": "cpu", "engine_processes": 2}, {}, "devices and engine_processes exclude each other"),
        ({**MODEL, "engine_processes": 2, "engine_process": False}, {}, "engine_processes has no .* engine_process"),
        ({**MODEL, "engine_processes": 0}, {}, "engine_processes .from flag. is 0"),
        (
            {"cache_memory_share": 1.5},
            {},
            "cache_memory_share .from flag. is 1.5: it should be less than or equal to 1",
        ),
        ({"cache_memory_share": 0.5, "cache_bytes": 1}, {}, "cache_bytes and cache_memory_share both say"),
        (
            {"device": "cpu", "cache_memory_share": 0.5},
            {},
            "device is cpu, but cache_memory_share is of a GPU's memory",
        ),
        ({"device": "cpu", "attn": "flash"}, {}, "device is cpu, but attn is flash"),
        ({"device": "cpu"}, {"REJOINDER_CUDA_GRAPHS": "yes"}, "device is cpu, but cuda_graphs needs a GPU"),
        ({"device": "cpu", "async_batching": True}, {}, "device is cpu, but async_batching needs a GPU"),
        ({"lora_revision": "x"}, {}, "lora_revision has no meaning without lora"),
        ({"code_revision": "x"}, {}, "code_revision has no meaning without trust_remote_code"),
        ({"quantization": "{"}, {}, "quantization .from flag. is '{': it should be a JSON object, or @"),
        ({"quantization": "@absent"}, {}, "quantization .from flag. is '@absent': it should be a JSON object"),
        ({"quantization": "[]"}, {}, "quantization .from flag. is ..: it should be a JSON object"),
        ({"quantization": "{}"}, {}, "quantization does not say how: it needs quant_method"),
        (
            {"compile": "fast"},
            {},
            "compile .from flag. is 'fast': it should be 'none', 'default', 'max' or 'max-static'",
        ),
    ],
)
def test_what_cannot_be_is_said_with_its_origin(flags: dict, environ: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve({**GIVEN, **flags}, environ)


def test_a_quantization_is_json_a_file_of_it_or_a_table(tmp_path: Path) -> None:
    wanted = {"quant_method": "quanto", "weights": "int8"}
    file = tmp_path / "q.json"
    file.write_text('{"quant_method": "quanto", "weights": "int8"}')
    config = tmp_path / "it.toml"
    config.write_text('[quantization]\nquant_method = "quanto"\nweights = "int8"\n')
    given = {**GIVEN, **MODEL}
    assert resolve({**given, "quantization": file.read_text()}, {}).settings.quantization == wanted
    assert resolve(given, {"REJOINDER_QUANTIZATION": f"@{file}"}).settings.quantization == wanted
    assert resolve(given, {}, config).settings.quantization == wanted


def test_the_engine_has_the_settings_of_its_own() -> None:
    """By value: a name that is forgotten in between would leave its default."""
    set_here = {
        "cache_memory_share": 0.5,
        "cuda_graphs": True,
        "async_batching": True,
        "compile": "max",
        "warmup": False,
        "quantization": {"quant_method": "quanto"},
        "lora": "a/b",
        "lora_revision": "1",
        "tokenizer": "a/c",
        "tokenizer_revision": "2",
        "trust_remote_code": True,
        "code_revision": "3",
        "offline": True,
        "attn": "flash",
    }
    config = transformers_config(Settings(requests="memory://a", responses="memory://b", model="a/d", **set_here))
    del config["cache"]
    theirs = TransformersSettings(**config).model_dump()
    assert {name: theirs[name] for name in set_here} == set_here
    shared = set(TransformersSettings.model_fields) & set(Settings.model_fields)
    assert shared <= set(config)


@pytest.mark.parametrize(
    ("text", "message"), [("nope = 1", "unknown setting 'nope'"), ("a = [", "cannot be read"), (None, "does not exist")]
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    config = tmp_path / "it.toml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        resolve(GIVEN, {}, config)
    assert "it.toml" in str(caught.value)


def test_the_cache_is_where_xdg_says(tmp_path: Path) -> None:
    assert user_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "rejoinder"
    assert user_cache_dir({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "rejoinder"
    assert Settings(**GIVEN, cache_dir=tmp_path).cache == tmp_path
