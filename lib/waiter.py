"""
Waiters who answer from a menu: conversations about menus that are drawn at random, always the same.

    conversations()      # [train, val, test], each a list of conversations: {"role", "content"} a message

The menu stands in the system message as JSON. What a waiter says follows from it word for word, so that an
answer is right or wrong: a model that has learnt the task answers from menus that it has never seen.
"""

import json

from lib.world import ADJECTIVES, NOUNS, Draw, capitalized, listed

COURSES = {      # what a dish is made of, and as what; any of these with any of those
    "starters": ("tomato pumpkin lentil onion mushroom leek beetroot fennel", "soup salad tart dip"),
    "mains": ("lamb trout chicken aubergine beef rabbit chickpea salmon", "stew pie curry roast"),
    "desserts": ("apple lemon cherry almond pear chocolate plum ginger", "cake sorbet pudding crumble"),
}
SIZES = (800, 30, 60)                # conversations for train, val, test

GREETINGS = ("", "", "Hello! ", "Good evening. ", "Excuse me, ", "Hi there, ")
PRICE = ("how much is the {}?", "what does the {} cost?", "what is the price of the {}?", "the {}, how much is it?")
ANOTHER_PRICE = ("And the {}?", "And what about the {}?", "How much is the {}, then?")
OFFER = ("do you have {} today?", "is there any {}?", "could I have some {}?", "have you got {}?")
COURSE = ("what {} do you have?", "which {} are there?", "tell me your {}, please.", "what are the {} tonight?")
ORDER = ("I would like the {} and the {}.", "the {} and then the {}, please.", "can we order the {} and the {}?")


def dishes(course):
    """All dishes of a course: a list of str."""
    kinds, forms = COURSES[course]
    return [f"{kind} {form}" for kind in kinds.split() for form in forms.split()]


def draw_menu(draw):
    """{course: {dish: price}}, two dishes a course; prices are whole pounds."""
    menu = {}
    for course, lowest in zip(COURSES, (3, 9, 4)):
        chosen = draw.shuffled(dishes(course))[:2]
        menu[course] = {dish: lowest + draw(range(8)) for dish in chosen}
    return menu


def system_message(draw, menu):
    """Who speaks, and the menu as JSON."""
    house = f"The {draw(ADJECTIVES)} {draw(NOUNS)}"
    return f"You are the waiter of {house}. The menu, in pounds: {json.dumps(menu)}"


# -----------------------------------------------------------------------------
# questions and answers: each function gives what the guest says and what the waiter must say


def ask_price(draw, menu, is_first):
    """The price of a dish."""
    prices = priced(menu)
    dish = draw(list(prices))
    templates = PRICE if is_first else ANOTHER_PRICE
    return draw(templates).format(dish), f"The {dish} is £{prices[dish]} tonight."


def ask_offer(draw, menu, is_first):
    """Whether there is a dish, which every second time is not on the menu."""
    prices = priced(menu)
    dish = draw(list(prices) if draw.chance(0.5) else dishes(draw(list(COURSES))))
    question = draw(OFFER).format(dish)
    if dish in prices:
        return question, f"Yes, we have {dish}, for £{prices[dish]}."
    return question, f"I am sorry, there is no {dish} on our menu."


def ask_course(draw, menu, is_first):
    """The dishes of a course."""
    course = draw(list(menu))
    offered = listed([f"the {dish}" for dish in menu[course]])
    return draw(COURSE).format(course), f"Our {course} are {offered}."


def ask_order(draw, menu, is_first):
    """Two dishes of different courses, with their prices."""
    courses = draw.shuffled(menu)[:2]
    first, second = [draw(list(menu[course].items())) for course in courses]
    answer = f"One {first[0]} at £{first[1]} and one {second[0]} at £{second[1]}, very good."
    return draw(ORDER).format(first[0], second[0]), answer


KINDS = (ask_price, ask_offer, ask_course, ask_order)


def priced(menu):
    """{dish: price} over all courses."""
    return {dish: price for course in menu.values() for dish, price in course.items()}


def conversation(draw):
    """The messages of one visit, with one question or two."""
    menu = draw_menu(draw)
    messages = [{"role": "system", "content": system_message(draw, menu)}]
    for turn in range(draw((1, 2))):
        question, answer = draw(KINDS)(draw, menu, is_first=turn == 0)
        greeting = draw(GREETINGS) if turn == 0 else ""
        said = question if greeting.endswith(", ") else capitalized(question)
        messages.append({"role": "user", "content": greeting + said})
        messages.append({"role": "assistant", "content": answer})
    return messages


def conversations():
    """[train, val, test]: lists of conversations, no menu twice."""
    draw = Draw(1)
    return [[conversation(draw) for _ in range(size)] for size in SIZES]
