"""The words of the demo: people, places and, per domain, things whose weight falls into three tiers.

Both the pretraining text (`demo_text`) and the federated task (`make_demo_task`) draw from these lists and from nothing
else. The tiers are what the task's labels rest on; the pretraining text shows them by what happens next ("it cannot
wait"), never by the task's label words.
"""

from __future__ import annotations


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


TIERS = ("grave", "some", "slight")

FIRST = words(
    "Anna Tom Mary Paul Ida Ben Clara Hugo Lena Max Nora Oscar Rosa Sam Vera Will Emma Jack Ella Leo Kate Finn"
)
LAST = words("Hill Reed Stone Wood Brook Field Lake Marsh Moor Dale Ford Park West Hart Cole Lane Bell Cook Ward Young")
STREETS = [f"{tree} {kind}" for tree in ("Elm", "Oak", "Pine", "Birch", "Rose", "Mill") for kind in ("Street", "Road")]
PLACES = [f"{tree} {kind}" for tree in ("Elm", "Oak", "Pine", "Birch", "Rose", "Mill") for kind in ("Bay", "Town")]
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = [str(n) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90)]

SYMPTOMS = {
    "grave": [
        "a pain in my chest",
        "no feeling in my arm",
        "blood in my eye",
        "no air at night",
        "a broken leg",
        "a burn on my face",
        "a very deep cut",
        "a heart that stops",
        "a fit every hour",
        "a bad fall behind me",
    ],
    "some": [
        "a fever",
        "a sore back",
        "a swollen foot",
        "an old cut that opens",
        "a rash on my arm",
        "a bad tooth",
        "a stiff neck",
        "a loud cough",
        "a sick stomach",
        "a weak knee",
    ],
    "slight": [
        "a dry lip",
        "a small cough",
        "an itch",
        "a cold nose",
        "tired feet",
        "a short nail",
        "a little spot",
        "a hoarse voice",
        "a light sneeze",
        "a pale skin",
    ],
}

MONEY = {
    "grave": [
        "my card was stolen",
        "all my money is gone",
        "a stranger uses my account",
        "the rent is due today",
        "my pay was taken",
        "the house will be sold",
        "the code was seen",
        "a thief has my cheque book",
        "the loan was cut off",
        "the transfer went to a stranger",
    ],
    "some": [
        "my card does not work",
        "the rent is due on Friday",
        "the fee is too large",
        "the loan ends this month",
        "the transfer is late",
        "a cheque came back",
        "the rate went up",
        "my limit is too small",
        "a bill was paid twice",
        "the account shows the wrong sum",
    ],
    "slight": [
        "I want a blue card",
        "the letter has my old street",
        "I have a new phone",
        "I like a paper statement",
        "I ask for a pen",
        "the form is long",
        "I plan to save a little",
        "the app is slow",
        "I look for a calendar",
        "the branch has a new door",
    ],
}

GOODS = words(
    "lamp chair table shelf carpet mirror clock basket kettle teapot candle blanket cushion vase bench ladder bucket"
    " hammer rake spade"
)
COLOURS = words("red blue green white black brown grey yellow")
PAYMENT = {"card": "paid", "bill": "open", "cash": "paid at the door", "gift": "free"}

SKIES = words("rain snow fog hail sun cloud thunder frost")
WINDS = words("north south east west")
WIND_WARNING = 50  # from this speed on a weather line ends with a warning

HOSPITAL_NOTES = (
    "The nurse on the ward knows me.",
    "I was in your clinic last year.",
    "The doctor has my file.",
    "My bed was by the window.",
    "I take one pill a day.",
)
BANK_NOTES = (
    "The clerk at the desk knows me.",
    "I am with your branch since spring.",
    "My savings are with you.",
    "My number is on the statement.",
    "I sign at the counter.",
)
