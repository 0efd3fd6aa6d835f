"""Short dialogues made from tables, so that a small base learns to speak: sums, names, opposites, tiny stories.

A conversation is a tuple of turns, user first. All is a function of the random generator alone.
"""

import random
import re

NAMES = ("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will "
         "Alice Bob Carol Daniel Ella Frank Gina Hugo Iris Jonas Lily Max Nina Oscar Peter Ruth Simon Vera").split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OPPOSITES = ("big small, hot cold, day night, light dark, fast slow, up down, old new, wet dry, open closed, "
             "full empty, high low, long short, soft hard, happy sad, rich poor, strong weak, early late, near far, "
             "loud quiet, clean dirty, thick thin, heavy light, good bad, left right, first last, "
             "sweet bitter, wide narrow")
SOUNDS = ("cat meow, dog woof, cow moo, sheep baa, duck quack, bee buzz, pig oink, lion roar, owl hoot, frog croak, "
          "mouse squeak, horse neigh, snake hiss, wolf howl, crow caw, chicken cluck")
COLORS = ("the sky: blue, the grass: green, snow: white, a banana: yellow, coal: black, a carrot: orange, milk: white, "
          "the night: black, the sea: blue, the sun: yellow, an elephant: gray, a rose: red, a leaf: green, "
          "a fox: red, a lemon: yellow, a cherry: red, a cloud: white, a crow: black, a frog: green, gold: yellow, "
          "a mouse: gray, a gull: white, chocolate: brown, a tomato: red, the moon: white, a spoon: gray")
KINDS = ("animal cat dog horse cow sheep pig whale lion bear wolf fox mouse rabbit monkey, "
         "bird gull owl penguin duck chicken crow, fruit apple banana orange cherry lemon pear, "
         "tool hammer saw knife spade, color red blue green yellow black white, "
         "planet Mars Venus Jupiter Saturn, city Paris Rome Tokyo Berlin Madrid, "
         "metal gold iron silver copper, insect bee ant butterfly fly, fish shark herring tuna salmon")
SIZES = "ant bee mouse frog bird cat fox dog sheep lion horse elephant whale".split()
ADJECTIVES = "small big old young happy brave quiet clever kind tired hungry lost white black red funny shy".split()
HEROES = "cat dog mouse fox bear owl gull whale frog horse rabbit duck boy girl sailor king fisherman robot".split()
PLACES = ["the sea", "the forest", "the garden", "the market", "the mountain", "the river", "the island", "the city",
          "the beach", "the harbor", "the old tower", "the school"]
THINGS = "ball shell apple book lamp letter key map boat coin hat flower stone bell rope bottle".split()
FEELINGS = ["was very happy", "laughed for a long time", "took it home", "gave it to a friend",
            "kept it for many years", "showed it to everybody", "sang a song about it", "slept well that night"]
LIKES = ("apples books boats cats dogs music stories rain snow trees flowers fish bread tea "
         "games maps songs horses trains winter summer gardens").split()
# Who speaks, and how a sentence sounds then: a model that has heard several voices takes on another one easily.
VOICES = {
    "pirate": ("Arr, {}, matey!", {"you": "ye", "your": "yer", "my": "me", "You": "Ye"}),
    "king": ("Hear me: {}. So says the king!", {}),
    "robot": ("Beep! {}. End of message.", {}),
    "grandmother": ("My dear child, {}. Now have some cake!", {}),
    "sea captain": ("Aye aye, {}. Full speed ahead!", {}),
    "poet": ("Oh, {}. How sweet is the song of the world!", {}),
    "wizard": ("By my beard, {}. That is magic!", {}),
    "farmer": ("Well now, {}, neighbor. Back to the cows!", {}),
    "fisherman": ("Ho ho, {}, young friend. Every fish knows it!", {"you": "ye", "your": "yer"}),
}


def _pairs(text: str) -> list[list[str]]:
    return [entry.split() for entry in text.split(", ")]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(rng: random.Random, *options: str) -> str:
    return rng.choice(options)


def _sum(rng):
    a, b = rng.randint(0, 6), rng.randint(0, 6)
    question = _pick(rng, "What is {} plus {}?", "How much is {} and {}?", "Add {} and {}.")
    return question.format(NUMBERS[a], NUMBERS[b]), f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}."


def _count(rng):
    start, length = rng.randint(1, 6), rng.randint(2, 6)
    words = NUMBERS[start:start + length + 1]
    text = ", ".join(words).capitalize() + "."
    return _pick(rng, "Count from {} to {}.", "Please count from {} to {}.").format(words[0], words[-1]), text


def _next(rng):
    cycle, noun = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    i = rng.randrange(len(cycle))
    after = cycle[(i + 1) % len(cycle)]
    if rng.random() < 0.5:
        return f"Which {noun} comes after {cycle[i]}?", f"After {cycle[i]} comes {after}."
    return f"Which {noun} comes before {after}?", f"Before {after} comes {cycle[i]}."


def _opposite(rng):
    pair = rng.choice(_pairs(OPPOSITES))
    if pair[1] not in ("light", "short"):  # words with two opposites are asked one way only
        rng.shuffle(pair)
    question = _pick(rng, "What is the opposite of {}?", "Tell me the opposite of {}.",
                     "Which word is the opposite of {}?")
    return question.format(pair[0]), f"The opposite of {pair[0]} is {pair[1]}."


def _sound(rng):
    animal, sound = rng.choice(_pairs(SOUNDS))
    question = _pick(rng, "What does {} say?", "Which sound does {} make?", "How does {} sound?")
    return question.format(_article(animal)), f"{_article(animal).capitalize()} says {sound}."


def _color(rng):
    thing, color = rng.choice(COLORS.split(", ")).split(": ")
    question = _pick(rng, "What color is {}?", "Which color does {} have?", "Tell me the color of {}.")
    return question.format(thing), f"{thing.capitalize()} is {color}."


def _kind(rng):
    kinds = _pairs(KINDS)
    kind, *members = rng.choice(kinds)
    member = rng.choice(members)
    other = rng.choice([k[0] for k in kinds if member not in k and (k[0], kind) != ("animal", "bird")])
    if kind in ("bird", "insect", "fish") and other == "animal":
        other = "tool"
    if member in ("orange", "gold", "silver", "copper") and other == "color":
        other = "city"
    noun = member if member[0].isupper() or kind in ("color", "metal") else _article(member)
    if rng.random() < 0.5:
        return f"Is {noun} {_article(kind)}?", f"Yes, {noun} is {_article(kind)}."
    return f"Is {noun} {_article(other)}?", f"No, {noun} is not {_article(other)}. It is {_article(kind)}."


def _compare(rng):
    i, j = sorted(rng.sample(range(len(SIZES)), 2))
    small, big = _article(SIZES[i]), _article(SIZES[j])
    first, second = rng.sample((small, big), 2)
    if rng.random() < 0.5:
        return f"Which is bigger, {first} or {second}?", f"{big.capitalize()} is bigger than {small}."
    return f"Which is smaller, {first} or {second}?", f"{small.capitalize()} is smaller than {big}."


def _name(rng):
    name = rng.choice(NAMES)
    hello = _pick(rng, "My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.").format(name)
    reply = f"Hello, {name}! It is nice to meet you."
    if rng.random() < 0.5:
        return hello, reply
    return hello, reply, _pick(rng, "What is my name?", "Do you know my name?", "Who am I?"), f"Your name is {name}."


def _greet(rng):
    name = rng.choice(NAMES)
    word = _pick(rng, "hello", "good morning", "goodbye", "thank you")
    return f"{_pick(rng, 'Say', 'Please say')} {word} to {name}.", f"{word.capitalize()}, {name}!"


def _spell(rng):
    word = rng.choice(HEROES + THINGS + SIZES)
    return _pick(rng, "Spell the word {}.", "How do you spell {}?").format(word), ", ".join(word.upper()) + "."


def _like(rng):
    first, second = rng.sample(LIKES, 2)
    if rng.random() < 0.5:
        return f"I like {first}.", f"{first.capitalize()} can make people happy. What do you like about {first}?"
    return (f"I like {first} and {second}.",
            f"You like {first} and {second}. I like to read about {_pick(rng, first, second)}.")


def _story(rng):
    hero, adjective = rng.choice(HEROES), rng.choice(ADJECTIVES)
    place, thing, end = rng.choice(PLACES), rng.choice(THINGS), rng.choice(FEELINGS)
    question = _pick(rng, "Tell me a story about {} {}.", "Can you tell me a story about {} {}?",
                     "Write a story about {} {}.")
    article = "an" if adjective[0] in "aeiou" else "a"
    look = _pick(rng, "One day", "One morning", "One night", "In the winter")
    return (question.format(f"{article} {adjective}", hero),
            f"Once there was {article} {adjective} {hero}. {look} the {hero} went to {place} and found "
            f"{_article(thing)}. The {hero} {end}.")


def _where(rng):
    hero, place, name = rng.choice(HEROES), rng.choice(PLACES), rng.choice(NAMES)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        return f"The {hero} is at {place}. Where is the {hero}?", f"The {hero} is at {place}."
    return f"{name} has {_article(thing)}. What does {name} have?", f"{name} has {_article(thing)}."


MAKERS = (_sum, _count, _next, _opposite, _sound, _color, _kind, _compare, _name, _greet, _spell, _like, _story, _where)


def generate(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """`count` conversations; the kinds take turns."""
    return [MAKERS[i % len(MAKERS)](rng) for i in range(count)]


def voiced(rng: random.Random, question: str, answer: str) -> tuple[str, str]:
    """The same question asked of somebody with a voice, and the first sentence of the answer in it."""
    who = rng.choice(list(VOICES))
    pattern, words = VOICES[who]
    sentence = re.split(r"[.!?](?:\s|$)", answer)[0]
    for word, theirs in words.items():
        sentence = re.sub(rf"\b{word}\b", theirs, sentence)
    if not re.match(r"(I|Mars)\b", sentence) and not pattern.startswith("Beep"):
        sentence = sentence[0].lower() + sentence[1:]
    ask = _pick(rng, "Answer like {}: {}", "Speak like {}: {}", "You are {}. {}")
    return ask.format(_article(who), question), pattern.format(sentence)
