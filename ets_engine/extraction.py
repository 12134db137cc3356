"""Finds the answer that a solution's text states; it compares none."""

from __future__ import annotations

import re

_HOPED = re.compile(r"final answer is:?\s?\$([^$\n]{1,300})\$\.? I hope")
_HASHES = re.compile(r"#### ?(?!\d+[.)][ \t]+\S)(-?\$?[.\d][^\n]{0,300})")  # "#### 2. Add" is a heading
_SAID = r"(?:[\s*_]|(?<=\n)(?:[->] |---\n|#{1,6} )){0,9}(\S[^\n]{0,299})"  # what stands in front of it is Markdown
_NO_ANSWER = r" not\b|n't| to\b| (?:correct|right|reasonable|verified|confirmed)(?:[.,;!\n]|\Z)"
_STATED = re.compile(
    r".*(?:answer\s?=(?=[\s*$]{0,9}(?:[-\d.\\(]|(?-i:[A-J]\b)))"  # but not "answer = total - 3" of a program
    rf"|(?:answer|correct (?:option|choice)) is\b(?!{_NO_ANSWER}):?){_SAID}",
    re.IGNORECASE | re.DOTALL,
)
_LABELLED = re.compile(  # "Final answer: 5", or a line that begins with "Answer:", or is a heading "Answer"
    rf".*(?:(?:final|correct) answer[*_ \t]{{0,9}}:|^[#*_> \t]{{0,9}}(?:final |correct )?answer[*_ \t]{{0,9}}[:\n])"
    rf"{_SAID}",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_CHOSEN = re.compile(  # "B is the correct answer", "so option (B) is right"
    r".*(?:(?<![a-zA-Z])(?<![Ii]f )(?<![Ww]hether )\(?([A-J])\)? is the (?:correct|right) (?:answer|option|choice)"
    r"|\b(?i:option|choice|answer) \(?([A-J])\)? is (?:correct|right))\b(?!\s?\?)",
    re.DOTALL,
)
_TAGGED = re.compile(r"<answer>(.{1,300}?)</answer>", re.IGNORECASE | re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bRs)\.\**(?:\s|$)|(?<=[a-z]{2})!\**(?:\s|$)")
_REASON = re.compile(r"(?<!\bsame),?\s(?:because|since|as(?! (?:many|much|few|often|long|far)\b)|so|which)\b")
_BECAUSE = re.compile(r",?\s(?:because|since)\b")
_LEAD = re.compile(
    r"(?:(?:approximately|about|exactly|therefore|thus|simply|clearly|equal to|given by)\b[\s,:]*|[\u2248~]\s?"
    r"|(?:around|roughly|nearly|only|so|hence|in|after|it's|(?:in |a )?total(?: of)?|profit(?: of)?)[\s,:]+"
    r"(?=[$\u20ac\u00a3]?\d)|(?:the )?(?:letter\s(?=(?-i:[A-Z])\b)|(?:number|point|interval)\s(?=[-\d$\\(])))+",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"(?:\([A-J]\)|[A-J][):.;])\s")
_YES = re.compile(r"(yes|no|true|false)(?=[,;:]\s)(?!.+\b(?:yes|no|true|false)\b)", re.IGNORECASE)
_DISPLAYED = re.compile(r"\\\[((?:(?!\\[\[\]]|\n\s{0,99}\n).){1,300})\\\]|\$\$([^$]{1,300})\$\$", re.DOTALL)
_WORKED = re.compile(  # a calculation, whose last number counts
    r"&(?!.*matrix)|\\\$|\\(?:text|mathrm|mbox)[^=]*=|\\underline|=\s*[a-z]\Z"
)
_CURRENCY = r"(?:[\u20ac\u00a3\u20b9\u00a5]|Rs\.?|US\$|USD|EUR|GBP|INR)"
_PLAIN = r"(-?\$?\d{1,15}(?:[.,]\d{1,15}){0,9})"
_AMOUNTS = [  # numbers with what is no part of them
    re.compile(rf"{_CURRENCY}\s?(-?\d[\d.,]*[a-z ]*)"),
    re.compile(rf"{_PLAIN}\s?(?:{_CURRENCY}|\u00b0\s?[CF])"),
    re.compile(rf"{_PLAIN} (?:kWh|kW|mL|L|N|V|W|J|Hz)"),
    re.compile(
        rf"{_PLAIN}\s?(?:\$|[a-z]{{3,}}|[kcm]?m|mi|ft|k?g|lbs?|N)\s?/\s?(?:[a-z]{{3,}}|hr?|s|in|m|ft)"
        r"(?:\^?[23]|[\u00b2\u00b3])?"
    ),
    re.compile(rf"{_PLAIN}\s?/\s?(?:day|week|month|year|hour|minute|second|person|item|unit|mile)"),
    re.compile(r"(?!option\b|choice\b)[a-z][a-z' ]{2,40}:\s?(-?\$?[\d\\][^:=]*)", re.IGNORECASE),
]
_REMARK = re.compile(  # "12 (in total)", "2/3 (approximately 0.67)", but not "2 (mod n)"
    r"([^a-zA-Z(][^()]*?)\s\((?!mod\b)(?:[a-z][a-z -]{2,60}|"
    r"(?:(?:or )?(?:about|approximately|roughly)|rounded)\b[^()]{1,80})\)([a-z ]*)",
    re.IGNORECASE,
)
_MATH_FIRST = re.compile(  # and after it neither a number nor what makes it another one
    r"(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\))"
    r"(?![^\n]*(?:[\d$\\]|\b(?:hundred|thousand|million|billion|trillion|and|or|plus|minus|times|mod|not)\b))"
)
_SUM = re.compile(
    r"(?:[\d\s.,+*/\u00d7\u00f7\u00b7()^={}$-]|%(?=\s?(?:of|[*\u00d7]))|\\(?:times|cdot|div|[dt]?frac|d?binom|sqrt)(?![a-z])"
    r"|\bof\b|(?<=[\d ])x(?=\s?\$?\d))+=(?!\s*[a-zA-Z]\Z)\s*([^=]+)"
)
_SPELT = (
    r"(?:(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|"
    r"seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|and)"
    r"[\s-]*)+"
)
_TWICE = re.compile(rf"{_SPELT}\((-?\d[\d.,]*)\)|(-?\d[\d.,]*) \({_SPELT}\)", re.IGNORECASE)  # "twelve (12)"
_PROSE = re.compile(  # "There are 3", "5 boys have 3", "30 comic books weigh 7.5 pounds", but not "A is right"
    r"(?!a is\b)(?:(?:let|multiply|divide|add|subtract) |(?:[a-z]{2,}|a|i),?[ \t]+[a-z]{2,}"
    r"|.*\b(?:is|are|was|were|be|has|have|had|will|can|must)\b"
    r"|(?:[^a-z]*[a-z]{2,}\b){4})",
    re.IGNORECASE,
)
_WORKING = re.compile(r"[^=]*=[^=,]*=|[^=]*(?<!\\)\b[a-zA-Z]{3,}[^=]*=")  # but not "x = 5" or "y - 2x = 3"

_MATH_LAST = re.compile(r"(?:\$\$?(?![\s$])([^$\n]{1,300})(?<!\s)\$\$?|\\\(((?:(?!\\\)).){1,300})\\\))[\s.*]*\Z")
_WORDS = re.compile(r"[^\\]*[a-zA-Z]{2,}\s[a-zA-Z]{2,}")  # between the dollar signs of two prices
_EQUALS = re.compile(r"=|\\approx(?![a-z])|≈")
_NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    r"(?:/\d+|[eE][-+]?\d+|[\^_]\{?-?\d+\}?|(?::\d+)+)?"
)
_UNIT_POWER = re.compile(  # "27 cm^2"
    r"(?<=\d)(?:\s?\\(?:text|mathrm)\{\s?)?(?:(?<=\{)|(?<=\{ )|\s)"
    r"(?:[kcm]?m|mi|in|ft|yd|units?|inch(?:es)?|f(?:ee|oo)t|(?:centi|kilo)?met(?:er|re)s?)\}?\s?\^\s?\{?[23]\}?(?!\w)"
)
_DIGIT = re.compile(r"\d")
_BEFORE_PART = re.compile(r"(?:\\(?:[dtc]?frac|sqrt(?:\[\d\])?|[dt]?binom)\{?|\}\{|[\^_]\{?)\Z")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The answer that a solution states, None when it states none.

    In this order: "final answer is $...$. I hope", the last `\boxed{}`, "#### number", the last `<answer>`, the last
    "answer is ...", "Answer: ..." or "B is the correct answer", the last number, with all of the formula that the text
    ends with. What is only a part of a formula, such as the 4 of `\frac{3}{4}`, is no answer.

    Example:
        >>> extract_answer(r"So $x=2$ and the total is $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> extract_answer("Then 3 + 4 = 7.\nThe answer is 7."), extract_answer("no idea")
        ('7', None)
        >>> extract_answer("**Answer:** C) 12"), extract_answer("The answer is therefore 12, as 3 + 9 = 12.")
        ('C) 12', '12')
    """
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\fbox{", "\\boxed{")
    if hoped := _HOPED.findall(text):
        return _last_boxed(hoped[-1]) or _clean(hoped[-1])
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip() or None
    if (hashes := _HASHES.findall(text)) and (answer := _clean(hashes[-1])):
        return answer
    text = _DISPLAYED.sub(_in_line, text)
    if tagged := _TAGGED.findall(text):
        return _stated(tagged[-1]) or _tagged(tagged[-1].strip())
    return _stated(text) or _last_number(text)


def _in_line(shown: re.Match[str]) -> str:
    formula = " ".join((shown[1] or shown[2]).split())
    return shown[0] if _WORKED.search(formula) else f"${formula}$"


def _tagged(said: str) -> str | None:
    answer = _clean(said)
    number = _last_number(said) if _PROSE.match(said) else None
    return number or (answer and _amount(answer))


def _stated(text: str) -> str | None:
    """What the last "answer is" or "Answer:" says, or which choice is said to be right.

    Prose about numbers and calculations do not count after a label.
    """
    found = [match for pattern in (_STATED, _LABELLED, _CHOSEN) if (match := pattern.match(text))]
    if not found:
        return None
    last = max(found, key=lambda match: match.start(match.lastindex or 0))
    if last.re is _CHOSEN:
        return last[1] or last[2]
    sentence = _SENTENCE_END.split(last[1], maxsplit=1)[0]
    if yes := _YES.match(sentence):
        return yes[1]
    said = _REASON.split(sentence, maxsplit=1)[0].strip(" \t*")
    said = said[lead.end() :] if (lead := _LEAD.match(said)) else said
    if math := _MATH_FIRST.match(said):
        said = math[1] or math[2]
    answer = _clean(said)
    if answer is None:
        return None
    total = _SUM.fullmatch(answer)
    end = last.start(1) + (len(sentence) if total and _DIGIT.search(total[1]) else 0)
    is_talk = total or _PROSE.match(_BECAUSE.split(sentence, maxsplit=1)[0]) or _WORKING.match(answer)
    if is_talk and last.re is _LABELLED and not _CHOICE.match(sentence) and _DIGIT.search(text, end):
        return None
    twice = _TWICE.fullmatch(answer)
    return _clean(total[1]) if total else (twice[1] or twice[2]) if twice else _amount(answer)


def _amount(answer: str) -> str:
    remark = _REMARK.fullmatch(answer)
    answer = (remark[1] + remark[2]).strip(" $") if remark else answer
    amount = next(filter(None, (form.fullmatch(answer) for form in _AMOUNTS)), None)
    return (amount and _clean(amount[1])) or answer


def _last_number(text: str) -> str | None:
    math = _MATH_LAST.search(text[-400:])
    if math and any(sign.isdigit() for sign in math[0]) and not _WORDS.match(formula := math[1] or math[2]):
        return _clean(_EQUALS.split(formula)[-1])
    text = _UNIT_POWER.sub("", text)
    *_, last = (None, *_NUMBER.finditer(text))
    if last is None or _BEFORE_PART.search(text[max(0, last.start() - 12) : last.start()]):
        return None
    return last[0]


def _clean(answer: str) -> str | None:
    answer = answer.strip(" \t\n*$`").removesuffix(".").rstrip("_").strip(" \t\n*$`:")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        answer = answer.removeprefix(opening).removesuffix(closing)
    if len(answer) > 2 and answer[0] == answer[-1] and answer[0] in "\"'":
        answer = answer[1:-1]
    return answer.strip() or None


def _last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, None without one or when it is not closed; escaped braces do not nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for brace in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None
