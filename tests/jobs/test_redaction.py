"""jobs/storage/redaction.py: which parts of a URL may be written down."""

import time

from hypothesis import given
from hypothesis import strategies as st

from jobs.storage.redaction import mask_signatures, redact_text, redact_url

SIGNED = "https://h/a.wav?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260101T000000Z&X-Amz-Signature="


def test_an_object_keeps_its_redacted_url_when_it_is_signed_again():
    assert redact_url(SIGNED + "one") == redact_url(SIGNED + "two") == "https://h/a.wav?***"
    versions = {redact_url(f"https://h/a.wav?versionId={number}&Signature=s{number}") for number in (1, 2)}
    assert len(versions) == 2  # another query is another object


def test_what_is_no_http_query_stays():
    for url in ("s3://bucket/what?.wav", "/data/a?b.wav", "https://h/a.wav", "a.wav"):
        assert redact_url(url) == url


@given(st.text(st.characters(codec="utf-8", exclude_characters="/@?"), max_size=20))
def test_redacting_twice_changes_nothing(part):
    for url in (f"https://u:{part}@h/x?token={part}", f"https://h/x?{part}"):
        assert redact_url(redact_url(url)) == redact_url(url)


def test_urls_in_messages_and_json_are_redacted_to_their_end():
    for text in (SIGNED + "canary", f"at {SIGNED}canary now", f'"{SIGNED}a\\u00e9canary"', f"{{'{SIGNED}canary'}}"):
        redacted = redact_text(text)
        assert "canary" not in redacted
        assert "https://h/a.wav?***" in redacted
    assert redact_text(f'{{"url": "{SIGNED}canary", "b": 1}}') == '{"url": "https://h/a.wav?***", "b": 1}'
    assert redact_text(f'"{{\\"url\\": \\"{SIGNED}canary\\"}}"') == '"{\\"url\\": \\"https://h/a.wav?***\\"}"'


def test_escapes_in_the_path_of_a_url_do_not_hide_its_query():
    signed = SIGNED.replace("a.wav", "caf\\u00e9.wav")
    assert redact_text(f'"{signed}canary"') == '"https://h/caf\\u00e9.wav?***"'


def test_a_text_of_many_urls_is_redacted_in_time_that_grows_with_it():
    started = time.monotonic()
    assert redact_text("http://" * 150_000).startswith("http://")  # 1 MB, the longest line of a manifest
    assert time.monotonic() - started < 10  # takes 0.1 s; in quadratic time 7 minutes


def test_metadata_keeps_its_links_but_for_signatures():
    assert mask_signatures("https://h/watch?v=abc&t=1") == "https://h/watch?v=abc&t=1"
    assert (
        mask_signatures('"https://h/x?v=1&X-Amz-Signature=canary&y=2"') == '"https://h/x?v=1&X-Amz-Signature=***&y=2"'
    )
