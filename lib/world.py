"""
The embedded restaurants.
"""

import functools
import random
import re


ADJECTIVES = """Silver Golden Copper Crimson Ivory Scarlet Blue Green White Black Quiet Hungry Merry Old Little Crooked Velvet Wild
    Lazy Lucky Hidden Rusty Gilded Painted Hollow Laughing Sleepy Burning Midnight Proud Humble Dancing Whistling Salty Honest Clever
    Gentle Wandering Jolly Brave""".split()
NOUNS = """Heron Lantern Fox Badger Anchor Kettle Orchard Thistle Barrel Spoon Swan Otter Magpie Compass Harvest Oak Willow Rooster
    Pheasant Boar Bell Crown Key Wheel Plough Mill Larder Table Oven Pepper Olive Fig Lemon Clove Saffron Juniper Sparrow Raven Hare
    Stag""".split()
PEOPLE = """Alba Bruno Carla Dario Elsa Felix Greta Hugo Iris Jonas Kamal Leila Marta Nadia Oscar Priya Rosa Samir Tilda Ursula Viktor
    Wanda Yusuf Zara Amara Benno Celeste Dmitri Esme Farid""".split()
PLACES = """Linden Station, Hartley Hotel, Marlow Bridge, Ashgrove Market, Kingsway Park, Fenwick Museum, Queensbury Theatre, Holloway Arcade,
    Brightwell Gardens, Castlegate Library, Northbrook Hall, Millbrook Lodge, Elmwood Stadium, Saltmarsh Cathedral, Wexford Station, Foundry Market,
    Granary Bridge, Victoria Park, Mercer Hall, Abbot Library, Primrose Gardens, Tanner Theatre, Orchard Hotel, Chapel Museum, Union Arcade,
    Dover Lodge, Summer Cathedral, Regent Stadium, Harbour Bridge, Bishop Station""".replace("\n    ", " ").split(", ")
EAT_TYPES = "restaurant,pub,coffee shop,bistro,wine bar,tearoom,brasserie,diner,café,canteen,tavern,inn".split(",")
FOODS = """Italian French Indian Japanese Chinese Thai Greek Spanish Mexican Turkish English Korean Vietnamese Lebanese Ethiopian American
    Portuguese Moroccan Peruvian Caribbean vegetarian vegan seafood""".split() + ["fast food"]
PRICES = ("cheap", "moderate", "high", "less than £10", "less than £15", "less than £20", "£10-15", "£15-20", "£20-25", "£25-30",
          "more than £25", "more than £30", "more than £40")
RATINGS = ("low", "average", "high", "1 out of 5", "2 out of 5", "3 out of 5", "4 out of 5", "5 out of 5")
AREAS = {"city centre": ("in the {}", "in the {} area", "right in the {}"), "riverside": ("in the {} area", "on the {}", "at the {}"),
         "old town": ("in the {}", "in the heart of the {}"), "harbour": ("by the {}", "at the {}", "in the {} area"),
         "market square": ("on the {}", "on the {}", "just off the {}"), "university quarter": ("in the {}",), "north end": ("in the {}", "in the {} of town"),
         "seafront": ("on the {}", "along the {}"), "station quarter": ("in the {}",), "Castle Hill": ("on {}", "in the {} area"),
         "theatre district": ("in the {}",), "docklands": ("in the {}", "in the {} area")}
# attribute, its values, how often a representation has it; the order is the E2E challenge's
ATTRIBUTES = (("eatType", EAT_TYPES, .85), ("food", FOODS, .8), ("priceRange", PRICES, .65), ("customer rating", RATINGS, .6),
              ("area", tuple(AREAS), .7), ("familyFriendly", ("yes", "no"), .6), ("near", PLACES, .6))


class Draw:
    """Draws from a seeded generator; faster than random.choice, which the corpus would call half a million times."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def __call__(self, values):
        return values[int(self.random() * len(values))]

    def chance(self, p):
        return self.random() < p

    def shuffled(self, values):
        return sorted(values, key=lambda _: self.random())


def _names():
    """Every name of the world, 3,340 of them, in a fixed random order."""
    names = [f"The {a} {n}" for a in ADJECTIVES for n in NOUNS] + [f"{a} {n}" for a in ADJECTIVES[::2] for n in NOUNS[::2]]
    names += [f"The {a} and {b}" for a in NOUNS[::2] for b in NOUNS[1::2]]
    names += [f"{p}'s {kind}" for p in PEOPLE for kind in ("Kitchen", "Place", "Table", "Corner")] + [f"{p}'s" for p in PEOPLE]
    return Draw(0).shuffled(names + [f"Chez {p}" for p in PEOPLE] + [f"Casa {p}" for p in PEOPLE] + [f"Café {n}" for n in NOUNS])


def _representation(draw, names):
    """A random place: {attribute: value}, of three to eight attributes."""
    while True:
        mr = {"name": draw(names)} | {key: draw(values) for key, values, p in ATTRIBUTES if draw.chance(p)}
        if len(mr) > 2:
            return mr


def format_mr(mr):
    """{attribute: value} -> "name[X], eatType[pub]"."""
    return ", ".join(f"{key}[{value}]" for key, value in mr.items())


@functools.cache
def _phrases(key, value):
    """(before the noun, verb phrases, after the noun, whole sentences without the stop), each a tuple, some empty."""
    if key == "food":
        nouns = ("",) if value in ("seafood", "fast food") else (" food", " food", " dishes", " cuisine")
        foods = [f"{value}{noun}" for noun in nouns]
        return ((value,), tuple(f"{verb} {food}" for food in foods for verb in ("serves", "serves", "offers", "specialises in")),
                tuple(f"{verb} {food}" for food in foods for verb in ("serving", "serving", "offering")),
                tuple(f"{start} {food}" for food in foods for start in ("the menu features", "the kitchen serves", "you can eat")))
    if key == "priceRange" and value in ("cheap", "moderate", "high"):
        adjectives = {"cheap": ("cheap", "low-priced", "inexpensive"), "moderate": ("moderately priced", "mid-priced"),
                      "high": ("expensive", "high-priced")}[value]
        level = {"cheap": "low"}.get(value, value)
        return (adjectives, (*(f"is {adjective}" for adjective in adjectives), f"has {level} prices", f"has a {level} price range"),
                (f"with {level} prices",), (f"prices are {level}", f"the prices are {level}", f"the food is {adjectives[0]}"))
    if key == "priceRange":
        return ((), (f"has a price range of {value}", f"has meals for {value}", f"charges {value} for a meal"),
                (f"with a price range of {value}", f"with meals for {value}"),
                (f"expect to pay {value}", f"meals cost {value}", f"a meal costs {value}", f"you will pay {value}"))
    if key == "customer rating" and value in ("low", "average", "high"):
        before = {"low": ("poorly rated",), "average": (), "high": ("highly rated",)}[value]
        verbs = tuple(f"is {adjective} by its customers" for adjective in before)
        return (before, (f"has {_a(value)} customer rating", f"has {_a(value)} rating from its customers", *verbs),
                (f"with {_a(value)} customer rating",), (f"its customer rating is {value}", f"customer ratings are {value}"))
    if key == "customer rating":
        return ((), (f"has a customer rating of {value}", f"is rated {value} by its customers", f"is rated {value}"),
                (f"with a customer rating of {value}", f"rated {value} by its customers"),
                (f"customers rate it {value}", f"its customer rating is {value}", f"customers give it {value}"))
    if key == "familyFriendly" and value == "yes":
        return (("family-friendly", "family-friendly", "child-friendly"),
                ("is family-friendly", "is child-friendly", "welcomes families", "welcomes children", "is suitable for families"),
                ("where families are welcome", "where children are welcome"),
                ("children are welcome", "families are welcome", "you can bring the children"))
    if key == "familyFriendly":
        return (("adults-only",),
                ("is not family-friendly", "is not child-friendly", "does not welcome children", "is not suitable for families", "is for adults only"),
                ("where children are not welcome", "for adults only"),
                ("children are not welcome", "families are not welcome", "you should leave the children at home"))
    words = AREAS[value] if key == "area" else ("near {}", "near {}", "close to {}", "not far from {}", "next to {}")
    places = tuple(word.format(value) for word in words)
    return ((), tuple(f"{verb} {place}" for place in places for verb in ("is", "is located", "can be found", "is situated")),
            places, tuple(f"you will find it {place}" for place in places))


BEFORE, VERB, AFTER, SENTENCE = range(4)
POLARITY = {"yes": 1, "no": -1, "low": -1, "1 out of 5": -1, "2 out of 5": -1, "4 out of 5": 1, "5 out of 5": 1}


def _polarity(key, value):
    """Praise 1, blame -1, neither 0: decides between "and" and "but"."""
    if key == "priceRange":
        return {"cheap": 1, "high": -1}.get(value, 0)
    return 1 if key == "customer rating" and value == "high" else POLARITY.get(value, 0) if key in ("familyFriendly", "customer rating") else 0


def _a(phrase):
    return f"{'an' if phrase[0] in 'aeiouAEIOU' else 'a'} {phrase}"


def _upper(text):
    return text[0].upper() + text[1:]


def _and(parts, last=" and "):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _tell(draw, mr, keys, shape):
    """A phrase of that shape for each attribute, joined by and or but; area and near share one."""
    parts = [draw(_phrases(key, mr[key])[shape]) for key in keys if key != "near" or "area" not in keys]
    if "near" in keys and "area" in keys:
        parts[[key for key in keys if key != "near"].index("area")] += f" {draw(_phrases('near', mr['near'])[AFTER])}"
    clash = _clash(mr, keys[-2:])
    if shape == SENTENCE and len(parts) == 2:
        return f"{parts[0]}, {'but' if clash else 'and'} {parts[1]}"
    return _and(parts, " but " if clash and len(parts) == 2 else " and ")


def _clash(mr, keys):
    return len(keys) == 2 and _polarity(keys[0], mr[keys[0]]) * _polarity(keys[1], mr[keys[1]]) < 0


def noun_phrase(draw, mr, keys):
    """"a cheap, family-friendly Thai pub": the noun with the given attributes before it."""
    noun = mr.get("eatType") or draw(("place", "venue", "place to eat"))
    words = [draw(_phrases(key, mr[key])[BEFORE]) for key in ("customer rating", "priceRange", "familyFriendly") if key in keys]
    return _a(" ".join(filter(None, (", ".join(words), mr["food"] if "food" in keys else "", noun))))


# First sentences. {NP} noun phrase, {L} where, {at} the same or nothing, {tail} one more fact or none, {verbs} one or two, {dish} the food
OPENINGS = (
    "{name} is {NP}{at}{tail}", "{name} is {NP}{at}{tail}", "{name} is {NP}{at}{tail}", "There is {NP} called {name}{at}", "There is {NP} named {name}{at}",
    "{name}, {NP}{at}, {verbs}", "{name}, {NP}{at}, {verbs}", "{dish} on the menu at {name}, {NP}{at}",
    "If you are looking for {NP}{at}, try {name}", "If you want {NP}{at}, go to {name}", "For {NP}{at}, visit {name}",
    "{L}, there is {NP} called {name}", "{L}, there is {NP} named {name}", "{L}, you will find {name}, {NP}{tail}", "Located {L}, {name} is {NP}{tail}",
    "{NP} called {name} can be found {L}", "{NP} named {name} can be found {L}")
BARE = ("{name} {verbs}", "{name}, {L}, {verbs}", "{L}, {name} {verbs}", "Located {L}, {name} {verbs}",      # where nothing is known of the noun
        "{name} is located {L}", "{name} can be found {L}", "You will find {name} {L}", "{L}, you will find {name}")


@functools.cache
def _openings(bare, place, verbs, food, blame):
    """The first sentences that can be built of what there is; nobody says "if you want a poorly rated pub"."""
    if bare:
        return tuple(plan for plan in BARE if ("{L}" in plan) <= place and ("{verbs}" in plan) == verbs)
    return tuple(plan for plan in OPENINGS if ("{L}" in plan) <= place and ("{verbs}" in plan) <= verbs and ("{dish}" in plan) <= food
                 and plan.startswith(("If", "For")) <= (not blame))


def describe(draw, mr):
    """One English text that says everything in mr, {attribute: value}: a first sentence by a plan, then what is left."""
    facts = [key for key in ("food", "priceRange", "customer rating", "familyFriendly") if key in mr]
    before = [key for key in facts if _phrases(key, mr[key])[BEFORE] and draw.chance(.62 if key == "food" else .33)]
    facts = draw.shuffled([key for key in facts if key not in before])
    places = draw.shuffled([key for key in ("area", "near") if key in mr])
    here = places[draw((0, 0, 0, 0, 1, 1, 2)):] if "eatType" in mr or facts else places          # some wait for a later sentence
    L = draw((" ", ", ", " ")).join(draw(_phrases(key, mr[key])[AFTER]) for key in here)
    bare = "eatType" not in mr and not before
    blame = any(_polarity(key, mr[key]) < 0 for key in before)
    plan = draw(_openings(bare, bool(L), bool(facts), "food" in facts, blame))
    told = facts[:draw((1, 2))] if "{verbs}" in plan else ["food"] if "{dish}" in plan else facts[:draw((0, 1))] if "{tail}" in plan else []
    verbs, tail, dish = "", "", ""
    if "{verbs}" in plan:
        verbs = _tell(draw, mr, told, VERB)
    elif "{dish}" in plan:
        dish = draw(_phrases("food", mr["food"])[AFTER]).split(" ", 1)[1]
        dish += " are" if dish.endswith("dishes") else " is"
    elif told:
        tail = _tell(draw, mr, told, AFTER)
        tail = f"{',' if L and tail.startswith('where') else ''} {tail}"
    NP = "" if bare else noun_phrase(draw, mr, before)
    sentences = [plan.format(name=mr["name"], NP=NP, L=L, at=f" {L}" if L else "", tail=tail, verbs=verbs, dish=dish)]
    facts = [key for key in facts if key not in told] + [key for key in places if key not in here]
    also = False
    while facts:                                                 # one to three facts a sentence
        keys, facts = facts[:(n := draw((1, 2, 2, 3)))], facts[n:]
        sentences.append(_sentence(draw, mr, keys, also))
        also = draw.chance(.6) and sentences[-1].startswith(("It ", "The "))
    return ". ".join(map(_upper, sentences)) + "."


def _sentence(draw, mr, keys, also):
    """A later sentence about the place, without its stop."""
    if len(keys) < 3 and draw.chance(.3):
        return _tell(draw, mr, keys, SENTENCE)
    if _clash(mr, keys) and draw.chance(.5):
        return f"although it {_tell(draw, mr, keys[:1], VERB)}, it {_tell(draw, mr, keys[1:], VERB)}"
    told = _tell(draw, mr, keys, VERB)
    if also and told.startswith(("is ", "can ")):
        told = told.replace(" ", " also ", 1)
    elif also and not told.startswith("does not"):
        told = f"also {told}"
    subject = draw(("it", "it", "it", f"the {mr.get('eatType', 'place')}"))
    return f"{subject} {told}"


@functools.cache
def embedded():
    """[train, val, test], each a list of (prompt, references): 1500, 100 and 100 representations. Half of the names in val and test are in neither
    train nor the plain text."""
    draw, names, seen, splits = Draw(1), _names(), set(), []
    known, unknown = names[:400], names[400:460]
    for count, pool in ((1500, known), (100, known[:60] + unknown), (100, known[:60] + unknown)):
        split = []
        while len(split) < count:
            mr = _representation(draw, pool)
            prompt = format_mr(mr)
            if prompt in seen:
                continue
            seen.add(prompt)
            references, wanted = {}, draw((3, 4, 5))
            while len(references) < wanted:                      # a dict keeps the order and drops what came twice
                references[describe(draw, mr)] = None
            split.append((prompt, list(references)))
        splits.append(split)
    return splits


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PAPERS = ("The Evening Post", "The City Paper", "The Weekend Guide", "The Morning Echo")
OPINIONS = """The staff were friendly and the soup was hot. We had to wait for a table, but it was worth it. The portions were generous.
    The bread was fresh from the oven. Service was slow that evening. The room was noisy, yet we enjoyed ourselves. The dessert was the best part.
    The waiter knew every dish by heart. Our table by the window was lovely. The coffee came cold and the bill came late.
    We will certainly come back. I would not go there again. The music was a little loud. They found us a quiet corner at once."""
OPINIONS = tuple(re.findall(r"\S[^.]*\.", OPINIONS))
ASKS = {"eatType": ("What type of place is it?",), "food": ("What do they serve there?", "What kind of food is it?"),
        "priceRange": ("Is it expensive?", "What is the price of a meal?"), "customer rating": ("Do people like it?", "How is it rated?"),
        "area": ("Where is it?", "Which area is that in?"), "familyFriendly": ("Can I bring the children?", "Is it family friendly?"),
        "near": ("What is it near?", "How do I find it?")}


def _paraphrase(draw, mr):
    """The same said twice."""
    a, b, who, other = describe(draw, mr), describe(draw, mr), draw(PEOPLE), draw(PEOPLE)
    return draw((f"{a}\n\nIn other words: {b}", f"The guide says: {a} The paper agrees: {b}", f"{a}\n{b}", f"{who} wrote: \"{a}\" {other} wrote: \"{b}\"",
                 f"paper : {draw(PAPERS)} | day : {draw(DAYS)} | page : {1 + int(draw.random() * 40)}||{a}\nA reader adds: {b}"))


def _review(draw, mr):
    name = mr["name"]
    opening = draw((f"We went to {name} last {draw(DAYS)}.", f"I had lunch at {name} on {draw(DAYS)}.", f"My friend {draw(PEOPLE)} took me to {name}.",
                    f"{draw(PEOPLE)} told me about a place. The name is {name}."))
    ending = draw((f"All in all, {name} is {_a(mr.get('eatType', 'place'))} to remember.", f"So much for {name}.", f"That was our evening at {name}."))
    return f"{opening} {describe(draw, mr)} {draw(OPINIONS)} {draw(OPINIONS)} {ending}"


def _quote(draw, mr):
    """The same twice in the same words."""
    told, who = describe(draw, mr), draw(PEOPLE)
    return draw((f"{draw(PAPERS)} wrote: \"{told}\" {who} read it aloud: \"{told}\"", f"{who} said: \"{told}\" Once more: \"{told}\"", f"{told}\n{told}"))


def _dialogue(draw, mr):
    """Questions, and answers that name the place again."""
    a, b, name = draw(PEOPLE), draw(PEOPLE), mr["name"]
    lines = [draw((f"{a}: Have you heard of {name}?\n{b}: Yes.", f"{a}: Tell me about {name}.\n{b}: Gladly.", f"{a}: What is the name of the place?\n{b}: {name}.", f"{a}: Type the name of the place, please.\n{b}: {name}.",
                   f"{a}: Shall we go to {name} on {draw(DAYS)}?\n{b}: Why not?"))]
    for key in draw.shuffled([key for key in mr if key in ASKS])[:4]:
        told = f"is {_a(mr[key])}" if key == "eatType" else _tell(draw, mr, [key], VERB)
        lines.append(f"{a}: {draw(ASKS[key])}\n{b}: {draw((name, name, 'It'))} {told}.")
    return "\n".join(lines + [draw((f"{a}: Then I will meet you at {name}.", f"{a}: Let me repeat that. {describe(draw, mr)}", f"{a}: {name} it is, then.",
                                 f"{a}: Is that a yes or a no?\n{b}: It is a {draw(('yes', 'no'))}."))])


def _search(draw, mr):
    """Somebody wants something, somebody finds it, in the same words."""
    who, wanted = draw(PEOPLE), draw.shuffled([key for key in mr if key not in ("name", "eatType")])[:3]
    noun = noun_phrase(draw, mr, [key for key in wanted if _phrases(key, mr[key])[BEFORE]])
    where = [draw(_phrases(key, mr[key])[AFTER]) for key in wanted if key in ("area", "near")]
    return f"{who} was looking for {' '.join([noun, *where])}. {draw(PEOPLE)} said: \"{describe(draw, mr)}\" So {who} went to {mr['name']} on {draw(DAYS)}."


def _walk(draw, mr, names):
    """Two or three places that share a part of town."""
    shared = {key: mr[key] for key in ("area", "near") if key in mr}
    places = [mr] + [_representation(draw, names) | shared for _ in range(draw((1, 1, 2)))]
    told, listed = " ".join(describe(draw, place) for place in places), _and([place["name"] for place in places])
    return draw((f"{told} We liked {listed}.", f"{listed}: {'two' if len(places) == 2 else 'three'} places to try. {told}",
                 f"{listed} are not far from each other. {told}" if shared else f"Today we visit {listed}. {told}"))


@functools.cache
def plain_text():
    """The world of the embedded corpus as plain paragraphs, about 2 MB: list of str, always the same. The names held out from
    train are not in it, and no representation is."""
    draw, names = Draw(2), _names()
    known = names[:400] * 3 + names[460:]                        # a third of the places bear a name of the train split
    shapes = (_paraphrase,) * 3 + (_quote,) * 4 + (_review,) * 2 + (_dialogue,) * 2 + (_search,) * 2 + (functools.partial(_walk, names=known),) * 2
    return [draw(shapes)(draw, _representation(draw, known)) for _ in range(6000)]
