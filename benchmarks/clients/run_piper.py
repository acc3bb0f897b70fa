"""piper-tts: puts the vowels into Arabic and Hebrew text."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

from harness import measure

# Words of everyday text; sentences are drawn from them, and none is in both parts.
_ARABIC_TEXT = """
كتاب مدرسة بيت رجل امرأة ولد بنت ماء خبز سيارة طريق مدينة قرية شمس قمر ليل نهار يوم سنة شهر
كتب قرأ ذهب رجع أكل شرب جلس وقف فتح أغلق سمع رأى عرف قال سأل أجاب عمل درس لعب نام
كبير صغير جديد قديم جميل طويل قصير سريع بطيء قريب بعيد في من إلى على عن مع بعد قبل تحت فوق
"""
_HEBREW_TEXT = """
ספר בית ילד ילדה איש אישה מים לחם רחוב עיר כפר שמש ירח לילה יום שנה חודש שולחן כיסא דלת
כתב קרא הלך חזר אכל שתה ישב עמד פתח סגר שמע ראה ידע אמר שאל ענה עבד למד שיחק ישן
גדול קטן חדש ישן יפה ארוך קצר מהיר קרוב רחוק על אל מן עם אחרי לפני תחת של את גם
"""
_ARABIC, _HEBREW = _ARABIC_TEXT.split(), _HEBREW_TEXT.split()


def sentences(part: str, words: list[str], count: int) -> list[str]:
    rng = random.Random(part)
    return [" ".join(rng.sample(words, 6)) for _ in range(count)]


def load() -> Any:
    from piper.hebrew import NakdimonDiacritizer
    from piper.tashkeel import TashkeelDiacritizer

    return TashkeelDiacritizer(), NakdimonDiacritizer()


def work(pipelines: Any, part: str) -> dict[str, Any]:
    """The words with their vowels."""
    count = 32 if part == "calibration" else 60
    answers = []
    for pipeline, words in zip(pipelines, (_ARABIC, _HEBREW), strict=True):
        for sentence in sentences(part, words, count):
            answers += unicodedata.normalize("NFC", pipeline(sentence)).split()
    return {"answers": answers}


if __name__ == "__main__":
    measure(load, work)
