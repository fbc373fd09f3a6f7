"""What can be wrong with a sample, as codes that reports count by, and the record of a sample that was left out.

A fault is bad input: it counts against the limit at which a job stops. A rejection is a tool's decision about good input.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

FAULTS = {
    "file_unreadable": "a file of the corpus cannot be opened or read",
    "tar_broken": "a tar ends early or holds a header that is none; what comes before it is used",
    "parquet_broken": "a Parquet file without a readable footer, or with a damaged page",
    "line_too_long": "a line of a JSONL file over the limit",
    "json_invalid": "not JSON, or not a JSON object",
    "sample_invalid": "no conversation that can be trained on; the detail says what is missing",
    "text_not_a_string": "a text is a number (NaN), null or something else",
    "text_not_unicode": "a text holds a lone surrogate, which has no bytes",
    "key_duplicate": "an earlier sample of the corpus has the same key",
    "member_duplicate": "one sample of a tar holds two members of one name",
    "member_not_a_file": "a member of a tar is a link or a device",
    "name_outside": "a name is absolute or has .. and leads outside the corpus",
    "media_remote": "a picture or video is a URL; nothing is fetched",
    "media_data_uri": "a data: URI that is not base64",
    "media_missing": "a picture or video is not there",
    "media_without_placeholder": "more pictures or videos than places in the text",
    "placeholder_without_media": "more places in the text than pictures or videos",
    "media_empty": "a picture or video of no bytes",
    "media_too_large": "a picture or video of more bytes than the limit",
    "media_wrong_type": "the bytes are of no kind that the loader reads, or a video stands where a picture should",
    "image_bomb": "a picture that claims more pixels than the loader decodes",
    "image_too_narrow": "a picture or video whose sides differ by more than the model's processor takes",
    "image_broken": "a picture that does not decode to its end",
    "caption_refused": "the served model refuses the request for this sample (an HTTP status of 400 to 499)",
    "caption_empty": "the served model's answer holds no text, or was cut at the limit of tokens",
    "glyphs_missing": "no font has every character of the text",
    "background_broken": "a background picture that does not decode",
    "size_differs": "the boxes are for a picture of another size",
    "video_broken": "a video without a decodable video stream",
}
"""Reason code -> what it means."""


@dataclass(frozen=True)
class Dropped:
    """A sample that is left out.

    Attributes:
        source: the file it stands in, with line, row or member.
        key: of the sample, or the source where it has none.
        reason: a code.
        detail: what exactly, for a person.
        is_fault: bad input, as opposed to a decision of a tool.
    """

    source: str
    key: str
    reason: str
    detail: str = ""
    is_fault: bool = True

    def line(self) -> str:
        """One line of JSON; what cannot be written as UTF-8 is escaped."""
        return json.dumps(asdict(self))


class Fault(ValueError):
    """Something of a sample cannot be used; whoever reads the sample turns it into a Dropped.

    Attributes:
        reason: one of FAULTS.
        detail: what exactly.
        key: of the sample, where it was known already.
    """

    def __init__(self, reason: str, detail: str = "", key: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        # Addresses of objects in messages of libraries differ between runs.
        self.detail = re.sub(r"<\S+ object at 0x[0-9a-f]+>", "it", detail)[:300]
        self.key = key

    def dropped(self, source: str, key: str = "") -> Dropped:
        """The record of the sample that stands at `source`."""
        return Dropped(source, self.key or key or source, self.reason, self.detail)
