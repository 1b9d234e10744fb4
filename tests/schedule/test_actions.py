"""Actions read as they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshweave.errors import ScheduleError
from meshweave.schedule.actions import RECEIVED_AS, Action, Kind, parse_action

actions = st.builds(
    Action,
    st.sampled_from(list(Kind)),
    st.sampled_from(["language", "vision", "audio_2"]),
    st.integers(0, 99),
    st.integers(0, 999),
    st.integers(0, 99),
)


@given(actions)
def test_the_text_of_an_action_names_it(action: Action) -> None:
    if not action.sends and not action.receives:
        action = action._replace(peer=-1)
    if action.kind in (Kind.GATHER, Kind.REDUCE):
        action = action._replace(microbatch=-1)
    assert parse_action(str(action)) == action


@given(actions)
def test_a_send_and_its_receive_name_one_another(action: Action) -> None:
    if action.kind in RECEIVED_AS:
        received = action.received_by(7)
        assert (received.peer, received.receives) == (7, True)
        assert received.sent_by(action.peer) == action


def test_texts() -> None:
    assert str(Action(Kind.FORWARD, "language", 2, 5)) == "language.2F5"
    assert str(Action(Kind.SEND_FORWARD, "language", 2, 5, 3)) == "language.2SEND_F5>3"
    assert str(Action(Kind.RECEIVE_TOKENS, "vision", 0, 1, 0)) == "vision.0RECV_X1<0"
    assert str(Action(Kind.REDUCE, "vision", 0, -1)) == "vision.0REDUCE"


@pytest.mark.parametrize("text", ["", "language.F1", "language.2X1", "2F1", "language.2F1>"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no action"):
        parse_action(text)
