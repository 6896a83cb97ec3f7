"""URLs of stores: what each must look like, and one clear line for what does not."""

import pytest

from rejoinder.adapters import BadURL, open_blobs

BAD = {
    "ftp://bucket": "unknown scheme 'ftp'; known are file://, gs://, memory://, s3://",
    "bucket/prefix": "unknown scheme",
    "sqlite:///x.db": "unknown scheme 'sqlite'",
    "s3:///prefix": "is no bucket's name",
    "s3://": "is no bucket's name",
    "s3://b/x": "'b' is no bucket's name",
    "s3://user@bucket/x": "is no bucket's name",
    "s3://bucket:443/x": "is no bucket's name",
    "s3://bucket//x": "a part between slashes is empty",
    "s3://bucket/a/../b": "'.' or '..'",
    "s3://bucket/a\nb": "control characters",
    "s3://bucket/a#b": "a fragment ('#b') has no meaning here",
    "s3://bucket/a?regoin=x": "unknown parameter 'regoin'",
    "s3://bucket/a?region=": "parameter 'region' has no value",
    "s3://bucket/a?region=x&region=y": "parameter 'region' stands twice",
    "s3://bucket/" + "k" * 1025: "at most 1024 are allowed",
    "gs:///prefix": "is no bucket's name",
    "gs://Bucket/x": "is no bucket's name",
    "gs://bucket/x?kms_key_id=k": "unknown parameter 'kms_key_id'",
    "gs://bucket/x?kms_key_name=k": "must be projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY",
    "file://relative/dir": "must be file:///DIRECTORY, with three slashes",
    "file:///": "must be file:///DIRECTORY",
    "file://": "must be file:///DIRECTORY",
    "file:///a/../b": "'.' or '..'",
    "file:///a?mode=x": "unknown parameter 'mode'",
    "memory://": "must be memory://NAME/PREFIX",
    "memory:///x": "must be memory://NAME/PREFIX",
    "memory://x?lease=3": "unknown parameter 'lease'",
}


@pytest.mark.parametrize("url", BAD, ids=lambda url: url[:40].encode("unicode_escape").decode())
async def test_what_is_wrong_is_named_in_one_line(url):
    with pytest.raises(BadURL) as found:
        async with open_blobs(url):
            pass
    assert BAD[url] in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("url", ["memory://name", "memory://name/a%20b c", "file:///some dir/é%2F+"])
async def test_the_url_stands_as_it_was_given(url):
    async with open_blobs(url) as store, open_blobs(url + "/") as same:
        assert store.url == same.url == url
        assert store.location("a/b c%20+é") == f"{url}/a/b c%20+é"


async def test_s3_needs_a_region_from_somewhere(monkeypatch, tmp_path):
    from aws_stand_in import bare_environment

    bare_environment(monkeypatch, tmp_path)
    with pytest.raises(BadURL, match="no region for 's3://bucket/x'"):
        async with open_blobs("s3://bucket/x"):
            pass
