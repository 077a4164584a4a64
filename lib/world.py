"""
The embedded restaurants: a grammar that makes up places and tells about them in English, always the
same.

    embedded()      # [train, val, test], each a list of (prompt, references), as the E2E challenge has them
    plain_text()    # paragraphs about the same world, on which the small base is pretrained

A representation `mr` is {attribute: value}, and a `key` is one of its attributes. Values come
first, then phrases, sentences and texts, each part with its tables before its functions. In a table
" | " divides alternatives, of which one is drawn. An alternative that stands there twice is drawn
twice as often.
"""

import functools
import itertools
import random
import re


def alternatives(text):
    """The parts of a text that are divided by " | "."""
    return re.split(r"\s+\|\s+", text)


class Draw:
    """Draws from a seeded generator. The corpus draws half a million times, and random.choice is slow."""

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def __call__(self, values):
        return values[int(self.random() * len(values))]

    def chance(self, p):
        """True with probability p."""
        return self.random() < p

    def shuffled(self, values):
        """The values as a list in random order."""
        return sorted(values, key=lambda _: self.random())

    def filled(self, templates, **slots):
        """One of the templates, its slots filled. What the caller draws for the slots is drawn
        before the template is."""
        return self(templates).format(**slots)


# -----------------------------------------------------------------------------
# values

ADJECTIVES = """Silver Golden Copper Crimson Ivory Scarlet Blue Green White Black Quiet Hungry
    Merry Old Little Crooked Velvet Wild Lazy Lucky Hidden Rusty Gilded Painted Hollow Laughing
    Sleepy Burning Midnight Proud Humble Dancing Whistling Salty Honest Clever Gentle Wandering
    Jolly Brave""".split()
NOUNS = """Heron Lantern Fox Badger Anchor Kettle Orchard Thistle Barrel Spoon Swan Otter Magpie
    Compass Harvest Oak Willow Rooster Pheasant Boar Bell Crown Key Wheel Plough Mill Larder Table
    Oven Pepper Olive Fig Lemon Clove Saffron Juniper Sparrow Raven Hare Stag""".split()
PEOPLE = """Alba Bruno Carla Dario Elsa Felix Greta Hugo Iris Jonas Kamal Leila Marta Nadia Oscar
    Priya Rosa Samir Tilda Ursula Viktor Wanda Yusuf Zara Amara Benno Celeste Dmitri Esme Farid""".split()
PLACES = re.split(r",\s+", """Linden Station, Hartley Hotel, Marlow Bridge, Ashgrove Market,
    Kingsway Park, Fenwick Museum, Queensbury Theatre, Holloway Arcade, Brightwell Gardens,
    Castlegate Library, Northbrook Hall, Millbrook Lodge, Elmwood Stadium, Saltmarsh Cathedral,
    Wexford Station, Foundry Market, Granary Bridge, Victoria Park, Mercer Hall, Abbot Library,
    Primrose Gardens, Tanner Theatre, Orchard Hotel, Chapel Museum, Union Arcade, Dover Lodge,
    Summer Cathedral, Regent Stadium, Harbour Bridge, Bishop Station""")
EAT_TYPES = ("restaurant,pub,coffee shop,bistro,wine bar,tearoom,brasserie,diner,café,canteen,"
             "tavern,inn").split(",")
FOODS = ("Italian,French,Indian,Japanese,Chinese,Thai,Greek,Spanish,Mexican,Turkish,English,Korean,"
         "Vietnamese,Lebanese,Ethiopian,American,Portuguese,Moroccan,Peruvian,Caribbean,vegetarian,vegan,"
         "seafood,fast food").split(",")
PRICES = ("cheap,moderate,high,less than £10,less than £15,less than £20,£10-15,£15-20,£20-25,£25-30,"
          "more than £25,more than £30,more than £40").split(",")
RATINGS = "low,average,high,1 out of 5,2 out of 5,3 out of 5,4 out of 5,5 out of 5".split(",")
AREAS = {   # each with the words for being there
    "city centre": "in the {} | in the {} area | right in the {}",
    "riverside": "in the {} area | on the {} | at the {}",
    "old town": "in the {} | in the heart of the {}",
    "harbour": "by the {} | at the {} | in the {} area",
    "market square": "on the {} | on the {} | just off the {}",
    "university quarter": "in the {}",
    "north end": "in the {} | in the {} of town",
    "seafront": "on the {} | along the {}",
    "station quarter": "in the {}",
    "Castle Hill": "on {} | in the {} area",
    "theatre district": "in the {}",
    "docklands": "in the {} | in the {} area"}

NAMES = (   # a template and the words that fill it, in all combinations
    ("The {} {}", ADJECTIVES, NOUNS), ("{} {}", ADJECTIVES[::2], NOUNS[::2]),
    ("The {} and {}", NOUNS[::2], NOUNS[1::2]), ("{}'s {}", PEOPLE, ("Kitchen", "Place", "Table", "Corner")),
    ("{}'s", PEOPLE), ("Chez {}", PEOPLE), ("Casa {}", PEOPLE), ("Café {}", NOUNS))
ATTRIBUTES = (   # name, values, how often a representation has it; the order is the E2E challenge's
    ("eatType", EAT_TYPES, .85), ("food", FOODS, .8), ("priceRange", PRICES, .65),
    ("customer rating", RATINGS, .6), ("area", list(AREAS), .7), ("familyFriendly", ("yes", "no"), .6),
    ("near", PLACES, .6))


@functools.cache
def all_names():
    """Every name of the world, 3,340 of them, in a fixed random order. The first 400 are those of
    the train split, the next 60 are held out from it and from the plain text."""
    names = []
    for template, *tables in NAMES:
        names += [template.format(*words) for words in itertools.product(*tables)]
    return Draw(0).shuffled(names)


def representation(draw, names):
    """A random place: {attribute: value}, of three to eight attributes."""
    while True:
        mr = {"name": draw(names)}
        for key, values, share in ATTRIBUTES:
            if draw.chance(share):
                mr[key] = draw(values)
        if len(mr) > 2:
            return mr


def format_mr(mr):
    """{attribute: value} -> "name[X], eatType[pub]"."""
    return ", ".join(f"{key}[{value}]" for key, value in mr.items())


# -----------------------------------------------------------------------------
# phrases. A fact is an attribute and its value; it has phrases of up to four shapes:
#
#   before      a *cheap* pub
#   verb        it *has low prices*
#   after       a pub *with low prices*
#   sentence    *the prices are low*

LOCATION = {
    "verb": "is {} | is located {} | can be found {} | is situated {}",
    "after": "{}",
    "sentence": "you will find it {}"}
PHRASES = {   # of attribute[value], or else of the attribute
    "area": LOCATION,
    "near": LOCATION,
    "food": {
        "before": "{}",
        "verb": "serves {} | serves {} | offers {} | specialises in {}",
        "after": "serving {} | serving {} | offering {}",
        "sentence": "the menu features {} | the kitchen serves {} | you can eat {}"},
    "priceRange": {
        "verb": "has a price range of {} | has meals for {} | charges {} for a meal",
        "after": "with a price range of {} | with meals for {}",
        "sentence": "expect to pay {} | meals cost {} | a meal costs {} | you will pay {}"},
    "priceRange[cheap]": {
        "before": "cheap | low-priced | inexpensive",
        "verb": "is cheap | is low-priced | is inexpensive | has low prices | has a low price range",
        "after": "with low prices",
        "sentence": "prices are low | the prices are low | the food is cheap"},
    "priceRange[moderate]": {
        "before": "moderately priced | mid-priced",
        "verb": "is moderately priced | is mid-priced | has moderate prices | has a moderate price range",
        "after": "with moderate prices",
        "sentence": "prices are moderate | the prices are moderate | the food is moderately priced"},
    "priceRange[high]": {
        "before": "expensive | high-priced",
        "verb": "is expensive | is high-priced | has high prices | has a high price range",
        "after": "with high prices",
        "sentence": "prices are high | the prices are high | the food is expensive"},
    "customer rating": {
        "verb": "has a customer rating of {} | is rated {} by its customers | is rated {}",
        "after": "with a customer rating of {} | rated {} by its customers",
        "sentence": "customers rate it {} | its customer rating is {} | customers give it {}"},
    "customer rating[low]": {
        "before": "poorly rated",
        "verb": """has a low customer rating | has a low rating from its customers
            | is poorly rated by its customers""",
        "after": "with a low customer rating",
        "sentence": "its customer rating is low | customer ratings are low"},
    "customer rating[average]": {
        "verb": "has an average customer rating | has an average rating from its customers",
        "after": "with an average customer rating",
        "sentence": "its customer rating is average | customer ratings are average"},
    "customer rating[high]": {
        "before": "highly rated",
        "verb": """has a high customer rating | has a high rating from its customers
            | is highly rated by its customers""",
        "after": "with a high customer rating",
        "sentence": "its customer rating is high | customer ratings are high"},
    "familyFriendly[yes]": {
        "before": "family-friendly | family-friendly | child-friendly",
        "verb": """is family-friendly | is child-friendly | welcomes families | welcomes children
            | is suitable for families""",
        "after": "where families are welcome | where children are welcome",
        "sentence": "children are welcome | families are welcome | you can bring the children"},
    "familyFriendly[no]": {
        "before": "adults-only",
        "verb": """is not family-friendly | is not child-friendly | does not welcome children
            | is not suitable for families | is for adults only""",
        "after": "where children are not welcome | for adults only",
        "sentence": """children are not welcome | families are not welcome
            | you should leave the children at home"""}}
WORDING = AREAS | {   # of a value, or else of its attribute: what stands for {} in a phrase
    "near": "near {} | near {} | close to {} | not far from {} | next to {}",
    "seafood": "{}",
    "fast food": "{}",
    "food": "{} food | {} food | {} dishes | {} cuisine"}
POLARITY = {   # 1 praises the place, -1 blames it; what is not listed does neither
    "priceRange[cheap]": 1, "priceRange[high]": -1, "customer rating[high]": 1, "customer rating[low]": -1,
    "customer rating[5 out of 5]": 1, "customer rating[4 out of 5]": 1, "customer rating[2 out of 5]": -1,
    "customer rating[1 out of 5]": -1, "familyFriendly[yes]": 1, "familyFriendly[no]": -1}


@functools.cache
def wordings(key, value):
    """The words for a value in a phrase: ("food", "Thai") -> ["Thai food", .., "Thai cuisine"]."""
    templates = WORDING.get(value) or WORDING.get(key, "{}")
    return [template.format(value) for template in alternatives(templates)]


@functools.cache
def phrases(key, value, shape):
    """All phrases of a shape for a fact: ("food", "Thai", "verb") -> ["serves Thai food", ..]."""
    shapes = PHRASES.get(f"{key}[{value}]") or PHRASES[key]
    templates = alternatives(shapes[shape]) if shape in shapes else []
    return [template.format(words) for words in wordings(key, value) for template in templates]


def phrase(draw, mr, key, shape):
    """One phrase of that shape for an attribute of mr."""
    return draw(phrases(key, mr[key], shape))


def adjectival(mr, keys):
    """Those of keys that can stand before the noun."""
    return [key for key in keys if phrases(key, mr[key], "before")]


def polarity(mr, key):
    """1 where the attribute praises the place, -1 where it blames it, else 0."""
    return POLARITY.get(f"{key}[{mr[key]}]", 0)


def contrast(mr, keys):
    """Whether keys are two attributes, one of praise and one of blame."""
    return sorted(polarity(mr, key) for key in keys) == [-1, 1]


def with_article(words):
    """"pub" -> "a pub"."""
    article = "an" if words[0] in "aeiouAEIOU" else "a"
    return f"{article} {words}"


def capitalized(text):
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def listed(parts, last=" and "):
    """["x", "y", "z"] -> "x, y and z"."""
    *first, end = parts
    return ", ".join(first) + last + end if first else end


def tell(draw, mr, keys, shape):
    """A phrase of that shape for each attribute, joined by and or but. Area and near share one."""
    told = [key for key in keys if key != "near" or "area" not in keys]
    parts = {key: phrase(draw, mr, key, shape) for key in told}
    if len(told) < len(keys):
        parts["area"] += " " + phrase(draw, mr, "near", "after")
    word = "but" if len(parts) == 2 and contrast(mr, keys[-2:]) else "and"
    comma = "," if len(parts) == 2 and shape == "sentence" else ""
    return listed(parts.values(), f"{comma} {word} ")


def noun_phrase(draw, mr, keys):
    """The noun with those attributes before it: "a cheap, family-friendly Thai pub"."""
    noun = mr.get("eatType") or draw(("place", "venue", "place to eat"))
    told = [key for key in ("customer rating", "priceRange", "familyFriendly") if key in keys]
    adjectives = [phrase(draw, mr, key, "before") for key in told]
    words = [", ".join(adjectives)] if adjectives else []
    if "food" in keys:
        words.append(mr["food"])
    return with_article(" ".join([*words, noun]))


# -----------------------------------------------------------------------------
# sentences. The first one follows a plan with these slots:
#
#   {name}    the place                                {verbs}   one or two facts
#   {NP}      the noun phrase                          {dish}    "Thai food is"
#   {L}       where it is                              {tail}    one fact after a space, or nothing
#   {at}      where it is after a space, or nothing

PLANS = (
    "{name} is {NP}{at}{tail}", "{name} is {NP}{at}{tail}", "{name} is {NP}{at}{tail}",
    "There is {NP} called {name}{at}", "There is {NP} named {name}{at}",
    "{name}, {NP}{at}, {verbs}", "{name}, {NP}{at}, {verbs}",
    "{dish} on the menu at {name}, {NP}{at}", "If you are looking for {NP}{at}, try {name}",
    "If you want {NP}{at}, go to {name}", "For {NP}{at}, visit {name}",
    "{L}, there is {NP} called {name}", "{L}, there is {NP} named {name}",
    "{L}, you will find {name}, {NP}{tail}", "Located {L}, {name} is {NP}{tail}",
    "{NP} called {name} can be found {L}", "{NP} named {name} can be found {L}")
# These plans have no noun phrase; they serve where nothing is known that it could say.
PLANS_OF_FACTS = (
    "{name} {verbs}", "{name}, {L}, {verbs}", "{L}, {name} {verbs}", "Located {L}, {name} {verbs}")
PLANS_OF_PLACES = (
    "{name} is located {L}", "{name} can be found {L}", "You will find {name} {L}",
    "{L}, you will find {name}")
# how probable it is that a fact stands before the noun
CHANCE_BEFORE = {"food": .62, "priceRange": .33, "customer rating": .33, "familyFriendly": .33}


def possible_plans(mr, before, facts, here):
    """The plans that these facts can fill; nobody says "if you want a poorly rated pub"."""
    blamed = any(polarity(mr, key) < 0 for key in before)
    possible = {
        "{L}": here, "{verbs}": facts, "{dish}": "food" in facts, "If you": not blamed, "For ": not blamed}
    excluded = [words for words, is_possible in possible.items() if not is_possible]
    plans = PLANS
    if "eatType" not in mr and not before:
        plans = PLANS_OF_FACTS if facts else PLANS_OF_PLACES
    return [plan for plan in plans if not any(words in plan for words in excluded)]


def first_sentence(draw, mr, before, facts, here):
    """(the sentence without its stop, those of facts that it tells). The attributes of before stand
    in its noun phrase, those of here say where the place is."""
    separator = draw((" ", ", ", " "))
    where = separator.join(phrase(draw, mr, key, "after") for key in here)
    plan = draw(possible_plans(mr, before, facts, here))
    slots = {"name": mr["name"], "L": where, "at": f" {where}" if where else "", "tail": ""}
    told = []
    if "{verbs}" in plan:
        told = facts[:draw((1, 2))]
        slots["verbs"] = tell(draw, mr, told, "verb")
    elif "{dish}" in plan:
        told = ["food"]
        dish = draw(wordings("food", mr["food"]))
        slots["dish"] = f"{dish} are" if dish.endswith("dishes") else f"{dish} is"
    elif "{tail}" in plan:
        told = facts[:draw((0, 1))]
        for key in told:
            tail = phrase(draw, mr, key, "after")
            slots["tail"] = f", {tail}" if where and tail.startswith("where") else f" {tail}"
    if "{NP}" in plan:
        slots["NP"] = noun_phrase(draw, mr, before)
    return plan.format(**slots), told


def later_sentence(draw, mr, keys):
    """A sentence without its stop, which tells one to three attributes."""
    if len(keys) < 3 and draw.chance(.3):
        return tell(draw, mr, keys, "sentence")
    if contrast(mr, keys) and draw.chance(.5):
        first, second = (phrase(draw, mr, key, "verb") for key in keys)
        return f"although it {first}, it {second}"
    told = tell(draw, mr, keys, "verb")
    noun = mr.get("eatType", "place")
    subject = draw(("it", "it", "it", f"the {noun}"))
    return f"{subject} {told}"


def describe(draw, mr):
    """One English text that says everything in mr."""
    facts = [key for key in CHANCE_BEFORE if key in mr]
    before = [key for key in adjectival(mr, facts) if draw.chance(CHANCE_BEFORE[key])]
    facts = draw.shuffled([key for key in facts if key not in before])
    places = draw.shuffled([key for key in ("area", "near") if key in mr])
    can_wait = "eatType" in mr or facts
    n_later = draw((0, 0, 0, 0, 1, 1, 2)) if can_wait else 0
    first, told = first_sentence(draw, mr, before, facts, places[n_later:])
    sentences = [first]
    left = [key for key in facts if key not in told] + places[:n_later]
    while left:
        n = draw((1, 2, 2, 3))
        sentences.append(later_sentence(draw, mr, left[:n]))
        left = left[n:]
        draw.random()            # Nothing uses it, but without it all later draws would change.
    return ". ".join(map(capitalized, sentences)) + "."


# -----------------------------------------------------------------------------
# the corpus


def references(draw, mr):
    """Three to five different texts for mr."""
    texts = []
    wanted = draw((3, 4, 5))
    while len(texts) < wanted:
        text = describe(draw, mr)
        if text not in texts:
            texts.append(text)
    return texts


@functools.cache
def embedded():
    """[train, val, test], lists of 1500, 100 and 100 pairs (prompt, references): a representation
    as text, and texts that tell it. Half of the names in val and test are in neither train nor the
    plain text."""
    draw = Draw(1)
    names = all_names()
    examples = {}
    for total, pool in ((1500, names[:400]), (1700, names[:60] + names[400:460])):
        while len(examples) < total:
            mr = representation(draw, pool)
            prompt = format_mr(mr)
            if prompt not in examples:
                examples[prompt] = references(draw, mr)
    pairs = list(examples.items())
    return [pairs[:1500], pairs[1500:1600], pairs[1600:]]


# -----------------------------------------------------------------------------
# plain text. It tells the same things in other shapes, and it tells them twice: this teaches a
# small model to look back and copy, and LoRA cannot help a frozen base that does not. It holds no
# representation, nor a list of facts with the sentence after it. It does hold every token of a
# representation, because a frozen embedding must have been trained.

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PAPERS = ("The Evening Post", "The City Paper", "The Weekend Guide", "The Morning Echo")
OPINIONS = re.findall(r"\S[^.]*\.", """
    The staff were friendly and the soup was hot. We had to wait for a table, but it was worth it.
    The portions were generous. The bread was fresh from the oven. Service was slow that evening.
    The room was noisy, yet we enjoyed ourselves. The dessert was the best part.
    The waiter knew every dish by heart. Our table by the window was lovely.
    The coffee came cold and the bill came late. We will certainly come back.
    I would not go there again. The music was a little loud. They found us a quiet corner at once.""")
PARAPHRASES = (
    "{a}\n\nIn other words: {b}", "The guide says: {a} The paper agrees: {b}", "{a}\n{b}",
    '{who} wrote: "{a}" {other} wrote: "{b}"',
    "paper : {paper} | day : {day} | page : {page}||{a}\nA reader adds: {b}")
QUOTES = (
    '{paper} wrote: "{told}" {who} read it aloud: "{told}"', '{who} said: "{told}" Once more: "{told}"',
    "{told}\n{told}")
REVIEW_STARTS = (
    "We went to {name} last {day}.", "I had lunch at {name} on {other_day}.",
    "My friend {friend} took me to {name}.", "{who} told me about a place. The name is {name}.")
REVIEW_ENDS = (
    "All in all, {name} is {noun} to remember.", "So much for {name}.", "That was our evening at {name}.")
DIALOGUE_STARTS = (
    "{a}: Have you heard of {name}?\n{b}: Yes.", "{a}: Tell me about {name}.\n{b}: Gladly.",
    "{a}: What is the name of the place?\n{b}: {name}.",
    "{a}: Type the name of the place, please.\n{b}: {name}.",
    "{a}: Shall we go to {name} on {day}?\n{b}: Why not?")
DIALOGUE_ENDS = (
    "{a}: Then I will meet you at {name}.", "{a}: Let me repeat that. {told}", "{a}: {name} it is, then.",
    "{a}: Is that a yes or a no?\n{b}: It is a {answer}.")
QUESTIONS = {
    "eatType": "What type of place is it?",
    "food": "What do they serve there? | What kind of food is it?",
    "priceRange": "Is it expensive? | What is the price of a meal?",
    "customer rating": "Do people like it? | How is it rated?",
    "area": "Where is it? | Which area is that in?",
    "familyFriendly": "Can I bring the children? | Is it family friendly?",
    "near": "What is it near? | How do I find it?"}
ANSWER = "{a}: {question}\n{b}: {subject} {told}."
SEARCH = '{who} was looking for {wish}. {other} said: "{told}" So {who} went to {name} on {day}.'
WALKS = ("{told} We liked {names}.", "{names}: {count} places to try. {told}", "{start} {told}")


@functools.cache
def plain_names():
    """The names of the plain text: none is held out, and a third of the places bear a name of the
    train split."""
    names = all_names()
    return 3 * names[:400] + names[460:]


def paraphrase(draw, mr):
    """The same said twice."""
    return draw.filled(
        PARAPHRASES, a=describe(draw, mr), b=describe(draw, mr), who=draw(PEOPLE), other=draw(PEOPLE),
        paper=draw(PAPERS), day=draw(DAYS), page=draw(range(1, 41)))


def quote(draw, mr):
    """The same twice in the same words."""
    return draw.filled(QUOTES, told=describe(draw, mr), who=draw(PEOPLE), paper=draw(PAPERS))


def review(draw, mr):
    """An evening at the place."""
    name = mr["name"]
    start = draw.filled(
        REVIEW_STARTS, name=name, day=draw(DAYS), other_day=draw(DAYS), friend=draw(PEOPLE), who=draw(PEOPLE))
    end = draw.filled(REVIEW_ENDS, name=name, noun=with_article(mr.get("eatType", "place")))
    return " ".join([start, describe(draw, mr), draw(OPINIONS), draw(OPINIONS), end])


def dialogue(draw, mr):
    """Questions, and answers that name the place again."""
    name = mr["name"]
    slots = {"a": draw(PEOPLE), "b": draw(PEOPLE), "name": name}
    lines = [draw.filled(DIALOGUE_STARTS, day=draw(DAYS), **slots)]
    asked = draw.shuffled([key for key in mr if key in QUESTIONS])
    for key in asked[:4]:
        told = f"is {with_article(mr[key])}" if key == "eatType" else phrase(draw, mr, key, "verb")
        question = draw(alternatives(QUESTIONS[key]))
        lines.append(ANSWER.format(question=question, subject=draw((name, name, "It")), told=told, **slots))
    lines.append(draw.filled(DIALOGUE_ENDS, told=describe(draw, mr), answer=draw(("yes", "no")), **slots))
    return "\n".join(lines)


def search(draw, mr):
    """Somebody wants something, somebody finds it, in the same words."""
    who = draw(PEOPLE)
    facts = [key for key in mr if key not in ("name", "eatType")]
    wanted = draw.shuffled(facts)[:3]
    wish = noun_phrase(draw, mr, adjectival(mr, wanted))
    for key in wanted:
        if key in ("area", "near"):
            wish += " " + phrase(draw, mr, key, "after")
    return SEARCH.format(
        who=who, wish=wish, other=draw(PEOPLE), told=describe(draw, mr), name=mr["name"], day=draw(DAYS))


def walk(draw, mr):
    """Two or three places that share a part of town."""
    shared = {key: mr[key] for key in ("area", "near") if key in mr}
    places = [mr]
    for _ in range(draw((1, 1, 2))):
        places.append(representation(draw, plain_names()) | shared)
    told = " ".join(describe(draw, place) for place in places)
    names = listed([place["name"] for place in places])
    count = "two" if len(places) == 2 else "three"
    start = f"{names} are not far from each other." if shared else f"Today we visit {names}."
    return draw.filled(WALKS, told=told, names=names, count=count, start=start)


@functools.cache
def plain_text():
    """The world of the embedded corpus as 6,000 plain paragraphs, about 2 MB: list of str, always
    the same. The names held out from train are not in it, and no representation is."""
    draw = Draw(2)
    writers = (paraphrase, paraphrase, paraphrase, quote, quote, quote, quote, review, review,
               dialogue, dialogue, search, search, walk, walk)
    texts = []
    for _ in range(6000):
        write = draw(writers)
        texts.append(write(draw, representation(draw, plain_names())))
    return texts
