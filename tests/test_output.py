"""The output formats, character by character."""

from __future__ import annotations

import json

import pytest

from whisper_triton.output import Segment, Transcript, render

SEGMENTS = [Segment(0.0, 4.32, "Salt & <pepper>."), Segment(3599.9996, 3725.5, "日本 --> 東京.")]
SPOKEN = Transcript("talk.mp3", "ja", 3726.0, "Salt & <pepper>. 日本 --> 東京.", SEGMENTS)
SILENT = Transcript("silence.wav", None, 2.0, "", [])


def test_txt() -> None:
    assert render(SPOKEN, "txt") == "Salt & <pepper>. 日本 --> 東京.\n"
    assert render(SILENT, "txt") == "\n"


def test_txt_with_timestamps() -> None:
    assert render(SPOKEN, "txt", timestamps=True) == (
        "[00:00:00.000 --> 00:00:04.320] Salt & <pepper>.\n[01:00:00.000 --> 01:02:05.500] 日本 --> 東京.\n"
    )
    assert render(SILENT, "txt", timestamps=True) == ""


def test_srt() -> None:
    assert render(SPOKEN, "srt") == (
        "1\n00:00:00,000 --> 00:00:04,320\nSalt & <pepper>.\n\n2\n01:00:00,000 --> 01:02:05,500\n日本 -> 東京.\n"
    )
    assert render(SILENT, "srt") == ""


def test_vtt() -> None:
    assert render(SPOKEN, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:04.320\nSalt &amp; &lt;pepper&gt;.\n\n"
        "01:00:00.000 --> 01:02:05.500\n日本 --&gt; 東京.\n"
    )
    assert render(SILENT, "vtt") == "WEBVTT\n"


def test_json() -> None:
    line = render(SPOKEN, "json")
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert "日本" in line
    assert json.loads(line) == {
        "file": "talk.mp3",
        "language": "ja",
        "duration": 3726.0,
        "text": "Salt & <pepper>. 日本 --> 東京.",
        "segments": [
            {"start": 0.0, "end": 4.32, "text": "Salt & <pepper>."},
            {"start": 3599.9996, "end": 3725.5, "text": "日本 --> 東京."},
        ],
    }
    assert json.loads(render(SILENT, "json"))["segments"] == []


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="output_format is 'doc', should be one of txt, srt, vtt, json"):
        render(SPOKEN, "doc")
