"""What the rules of the safety filter find, what they leave alone, and which rules they take."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.stages import Blocked, RuleFilter, SafetyPolicy, SafetySettings, StageRequest, Verdict
from controlplane.stages._matching import MOST_WAYS, RuleError, compile_matcher, compile_regex
from controlplane.stages._reading import read
from controlplane.stages._rules import MOST_CHARACTERS
from rung.errors import ConfigError, InvalidRequestError
from rung.types import JobKind
from tests.fakes.asked import FakeAsk

UNRESTRICTED, MODERATE, STRICT = SafetyPolicy


async def verdict(
    prompt: str,
    policy: SafetyPolicy = MODERATE,
    *,
    kind: JobKind = JobKind.IMAGE,
    negative_prompt: str = "",
    blocked: dict[str, Blocked] | None = None,
    allowed: tuple[str, ...] = (),
) -> Verdict:
    settings = SafetySettings(policy=policy, blocked=blocked or {}, allowed=allowed)
    request = StageRequest(kind=kind, prompt=prompt, negative_prompt=negative_prompt)
    return await RuleFilter(settings, FakeAsk()).check(request)


async def test_unrestricted_lets_through_what_the_other_policies_refuse() -> None:
    free = await verdict("a pornographic scene", UNRESTRICTED)
    moderate = await verdict("a pornographic scene", MODERATE)

    assert free == Verdict(allowed=True, detail="Safety: unrestricted")
    assert not moderate.allowed
    assert moderate.category == "sexual"
    assert (await verdict("a naked statue", MODERATE)).allowed
    assert (await verdict("a naked statue", STRICT)).category == "nudity"


async def test_a_refusal_names_policy_and_category_and_no_word_of_the_list() -> None:
    refused = await verdict("a severed head on a table")

    assert refused.detail == "Safety: the policy moderate does not allow this (gore)"
    with pytest.raises(InvalidRequestError, match=r"policy moderate does not allow this \(gore\)") as caught:
        refused.require_allowed()
    assert caught.value.metadata == {"category": "gore"}


@pytest.mark.parametrize(
    "disguised",
    [
        "HENTAI",
        "Hëntâi",
        "hen\u200btai",
        "hen\u00adtai",
        "h\u0435ntai",  # a Cyrillic letter
        "ｈｅｎｔａｉ",  # noqa: RUF001
        "".join(chr(0x1D4EA + ord(each) - ord("a")) for each in "hentai"),  # letters of mathematics
        "h3nt4i",
        "h3nta1",
        "h3nt@!",
        "h e n t a i",
        "a picture: h e n t a i",
        "a h e n t a i picture",
        "h.e.n.t.a.i",
        "h-e-n-t-a-i",
        "h - e - n - t - a - i",
        "h_e_n_t_a_i",
        "h 3 n t 4 i",
        "hen-tai",
        "hen*tai",
        "heeeentaiiii",
        "(hentai:1.4)",
        "some,hentai.",
        "\u202ehentai\u202c",
    ],
)
async def test_a_disguise_hides_nothing(disguised: str) -> None:
    assert (await verdict(disguised)).category == "sexual"


@pytest.mark.parametrize(
    "harmless",
    [
        "Scunthorpe town hall in Essex",
        "E S S E X, in large letters",
        "S C U N T H O R P E",
        "a cocktail with a peacock and a shuttlecock",
        "Arsenal against Middlesex",
        "a grape, a therapist, a drapery",
        "an assassin bug analysing grass",
        "a shiitake mushroom and a canal",
        "455 cars, 1000000 stars, 53x81 tiles",
        "Pen Island, home of experts exchange",
        "Nudeln mit Tomaten",
        "the executive of a bomber squadron",
        "Mr Dickinson of Penistone",
        "a shooting star over a killer whale",
        "a heroine with a gunmetal sword",
        "ein Titel mit Umlauten: Käse, Straße, Öl",
        "портрет кота у окна",  # noqa: RUF001
        "猫が窓辺に座っている",
    ],
)
async def test_words_that_contain_others_are_left_alone_even_by_strict(harmless: str) -> None:
    assert (await verdict(harmless, STRICT)).allowed


@pytest.mark.parametrize(
    "prompt",
    [
        "nude child",
        "a 12 year old, naked",
        "a twelve-year-old girl, topless",
        "12yo, lewd",
        "sexy schoolgirl",
        "n a k e d little girl",
        "a t33nager, nud3",
        "lolicon",
        "aged 15, erotic pose",
    ],
)
@pytest.mark.parametrize("policy", list(SafetyPolicy))
async def test_nothing_sexual_about_minors_at_any_policy(prompt: str, policy: SafetyPolicy) -> None:
    refused = await verdict(prompt, policy, allowed=("naked", "nude", "child", "topless"))

    assert not refused.allowed
    assert refused.category == "sexual content about minors"
    assert refused.detail == "Safety: no policy allows this (sexual content about minors)"


@pytest.mark.parametrize(
    "prompt",
    [
        "children playing in a park",
        "a nude woman by Rubens",
        "a girl in a red coat",
        "a 12 year old whisky beside a nude statue",
        "a 25 year old woman, nude",
        "a naked mole rat and a kid",
        "stars for kids, visible to the naked eye",
        "a child, no nudity",
        "sex education for teenagers, a school poster",
        "a boy with his dog",
    ],
)
async def test_the_rule_about_minors_means_what_it_refuses(prompt: str) -> None:
    assert (await verdict(prompt, UNRESTRICTED)).allowed


async def test_a_negative_prompt_is_no_offence_unless_it_undresses_a_minor() -> None:
    assert (await verdict("a portrait", STRICT, negative_prompt="nsfw, nude, child")).allowed
    assert (await verdict("a child on a beach", UNRESTRICTED, negative_prompt="blurry, nude")).allowed
    refused = await verdict("a child on a beach", UNRESTRICTED, negative_prompt="blurry, clothes")
    assert refused.category == "sexual content about minors"


async def test_in_a_long_text_a_minor_and_something_sexual_have_to_be_near_each_other() -> None:
    apart = "The children left the house. " + "They walked on. " * 10 + "The naked king laughed."

    assert (await verdict(apart, UNRESTRICTED, kind=JobKind.SPEECH)).allowed
    assert not (await verdict(apart, UNRESTRICTED, kind=JobKind.IMAGE)).allowed
    assert not (await verdict("a naked child", UNRESTRICTED, kind=JobKind.SPEECH)).allowed


async def test_rules_of_an_operator_hold_at_every_policy() -> None:
    blocked = {"brands": Blocked(words=("Acme*", "big corp"), regexes=(r"mega.{0,3}soft",))}

    for prompt in ("an ACMEish anvil", "the Big-Corp tower", "Mega  Soft office", "M3GA-SOFT"):
        refused = await verdict(prompt, UNRESTRICTED, blocked=blocked)
        assert refused.category == "brands", prompt
    assert (await verdict("a big blue corp", UNRESTRICTED, blocked=blocked)).allowed


async def test_a_phrase_that_is_harmless_here_is_allowed_and_the_same_words_elsewhere_are_not() -> None:
    allowed = ("blood orange", "naked mole rat")

    assert (await verdict("a naked mole rat", STRICT, allowed=allowed)).allowed
    assert not (await verdict("a naked mole rat, naked", STRICT, allowed=allowed)).allowed


async def test_a_text_that_is_too_long_is_refused_unread() -> None:
    refused = await verdict("a" * (MOST_CHARACTERS + 1), UNRESTRICTED)

    assert refused.category == "length"
    assert (await verdict("cat " * (MOST_CHARACTERS // 4), STRICT)).allowed


@pytest.mark.parametrize(
    ("words", "regexes", "problem"),
    [
        (("*",), (), r"a \* stands at the end of a word"),
        (("ab*",), (), r"after at least 3 letters"),
        (("a*b",), (), r"a \* stands at the end"),
        (("...",), (), "has no word in it"),
        ((), ("(",), "is no regex"),
        ((), ("x" * 201,), "is longer than 200 characters"),
        ((), ("(a+)+$",), "more than 1000 ways"),
        ((), ("(a|a)*b",), "more than 1000 ways"),
        ((), (".*foo",), "more than 1000 ways"),
        ((), ("(x{0,40}){0,40}",), "more than 1000 ways"),
        ((), ("a{0,30}a{0,30}a{0,30}b",), "more than 1000 ways"),
        ((), ("(ab|a.){11}c",), "more than 1000 ways"),
        ((), ("(?:(?:a{900}){900}){900}",), "more than 1000 ways"),
        ((), (r"(a)\1",), "groupref"),
        ((), ("(?=a)b",), "assert"),
    ],
)
def test_a_rule_that_cannot_be_used_or_could_take_long_is_refused_by_name(
    words: tuple[str, ...], regexes: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(RuleError, match=problem):
        compile_matcher(words, regexes)
    with pytest.raises(ConfigError, match=problem):
        RuleFilter(SafetySettings(blocked={"mine": Blocked(words=words, regexes=regexes)}), FakeAsk())


@pytest.mark.parametrize(
    "regex", [r"\bgold(en)?\b", "colou?rs?", "under ?age.{0,30}(girl|boy)", r"[a-z]{1,20}\d{2,4}", "a{0,999}"]
)
def test_regexes_with_bounds_are_taken(regex: str) -> None:
    compile_regex(regex)


def test_the_slowest_regex_that_is_taken_ends_on_the_longest_text() -> None:
    # About a thousand ways at each of 100,000 places, and none of them matches.
    regex = compile_regex(f"a{{0,{MOST_WAYS - 1}}}b")

    assert not compile_matcher((), (regex.pattern,)).matches(read("a" * 20_000 + "c"))


@given(st.text(max_size=200))
def test_any_text_can_be_read_and_its_words_stand_between_spaces(text: str) -> None:
    reading = read(text)

    for words in reading.words:
        assert words.startswith(" ")
        assert words.endswith(" ")
    assert not any(unicodedata.category(each) == "Mn" for each in reading.plain[0])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=9), st.sampled_from([" ", ".", "-", " - "]))
def test_a_word_is_found_however_its_letters_are_kept_apart(letters: list[str], apart: str) -> None:
    word = "".join(letters)

    assert compile_matcher([word]).matches(read(f"before: {apart.join(letters)}; after"))
