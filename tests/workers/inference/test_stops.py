"""Stop strings: never a part of one goes out, however the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_schemas.errors import InvalidRequest
from workers.inference.stops import StopFilter, stop_strings

TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def run(stops, pieces):
    """Feed pieces as the token loop does; return what went out, and whether a stop string was met."""
    stop_filter, out = StopFilter(stops), []
    for piece in pieces:
        text, stopped = stop_filter.feed(piece)
        out.append(text)
        if stopped:
            return "".join(out), True
    return "".join(out) + stop_filter.flush(), False


def reference(stops, text):
    """Character by character, on the whole text so far."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(stops=STOPS, text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=12))
def test_the_result_is_that_of_the_whole_text_for_every_split(stops, text, cuts):
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert run(stops, pieces) == reference(stops, text)


@settings(deadline=None)
@given(stops=STOPS, text=TEXT)
def test_no_stop_string_ever_goes_out(stops, text):
    out, _ = run(stops, list(text))
    assert not any(stop in out for stop in stops)


def test_text_that_only_begins_like_a_stop_string_is_given_back_at_the_end():
    assert run(("\n\nUser:",), ["Yes.", "\n", "\nUse"]) == ("Yes.\n\nUse", False)


def test_text_goes_out_at_once_when_it_cannot_belong_to_a_stop_string():
    assert StopFilter(("###",)).feed("word #") == ("word ", False)


def test_without_stop_strings_everything_passes():
    assert StopFilter(()).feed("anything") == ("anything", False)


@pytest.mark.parametrize(("given_stop", "wanted"), [(None, ()), ("a", ("a",)), ([], ()), (["a", "b"], ("a", "b"))])
def test_all_spellings_of_stop(given_stop, wanted):
    assert stop_strings(given_stop) == wanted


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(InvalidRequest) as caught:
        stop_strings(stop)
    assert (caught.value.code, caught.value.param) == ("invalid_stop", "stop")
