"""What a transcription is, and how it is written: plain text, SubRip (srt), WebVTT (vtt) or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

FORMATS = ("txt", "srt", "vtt", "json")


@dataclass(frozen=True)
class Segment:
    """What was said between `start` and `end`, in seconds from the start of the file; `text` is one line."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """The words of one file.

    Attributes:
        file: its name as the user gave it.
        language: code of the spoken language, given or detected, such as "en"; None if the model cannot tell.
        duration: of the audio, in seconds.
        text: all words in one line.
        segments: the same words in order of time; none where nothing was said.
    """

    file: str
    language: str | None
    duration: float
    text: str
    segments: list[Segment]


def render(transcript: Transcript, output_format: str, *, timestamps: bool = False) -> str:
    """The transcript as the content of a file, newline at the end included.

    Args:
        transcript: what to write.
        output_format: one of `FORMATS`. "txt" is one line; "json" is one line too, an object with the fields of
            `Transcript`, so that several can follow one another.
        timestamps: "txt" only: a line a segment, with its times in front.
    """
    if output_format == "json":
        return json.dumps(asdict(transcript), ensure_ascii=False) + "\n"
    if output_format == "srt":
        cues = [f"{i}\n{_span(s, ',')}\n{_plain(s.text)}\n" for i, s in enumerate(transcript.segments, start=1)]
        return "\n".join(cues)
    if output_format == "vtt":
        return "\n".join(["WEBVTT\n", *(f"{_span(s, '.')}\n{_escape(s.text)}\n" for s in transcript.segments)])
    if output_format != "txt":
        raise ValueError(f"output_format is {output_format!r}, should be one of {', '.join(FORMATS)}")
    if timestamps:
        return "".join(f"[{_span(s, '.')}] {s.text}\n" for s in transcript.segments)
    return transcript.text + "\n"


def _span(segment: Segment, decimal_mark: str) -> str:
    return f"{_clock(segment.start, decimal_mark)} --> {_clock(segment.end, decimal_mark)}"


def _clock(seconds: float, decimal_mark: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{decimal_mark}{rest % 1000:03d}"


def _plain(text: str) -> str:
    # The arrow between two times would end a SubRip cue; the format has no way to escape it.
    return text.replace("-->", "->")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
