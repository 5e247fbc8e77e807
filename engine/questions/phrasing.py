"""How each type of question is asked, answered and stated, by its name in types.py.

Fields: {A} {B} {C} {D} the things; {s} the short answer and {w} what stands in a sentence, of types whose answer is one
of some words or one of the things; {X} the thing that is picked, {Y} the others, {or} and {and} the list of all, {R}
what they are compared with; {n} a number with its unit, {c} {are} a count in a sentence, {radius} its limit; {first}
to {third} things in order. A sentence begins with a capital letter whatever it begins with.
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    states: tuple[str, ...]  # true or false


NORTH = "The camera of the second image faces north."

PHRASES = {
    # -- level 0: pixels
    "nearer_point": Phrases(
        ("Which is {w} the camera, {or}?", "Of {and}, which one is {w} the camera?",
         "Compare {and}: which is {w} the camera?"),
        ("{X}", "{X} is {w} the camera.", "It is {X}."),
        ("{X} is {w} the camera than {Y}.", "Compared with {Y}, {X} is {w} the camera.",
         "Of the two, {and}, {X} is {w} the camera."),
    ),
    "nearest_point": Phrases(
        ("Which is {w} the camera: {or}?", "Of {and}, which one is {w} the camera?",
         "Compare {and}. Which is {w} the camera?"),
        ("{X}", "{X} is {w} the camera.", "It is {X}."),
        ("Of {and}, {X} is {w} the camera.", "{X} is the one {w} the camera among {and}.",
         "Among {and}, the one {w} the camera is {X}."),
    ),
    "higher_point": Phrases(
        ("Which is {w} in the room, {or}?", "Of {and}, which one is {w}, by height in the room?",
         "By height in the real scene, which is {w}: {or}?"),
        ("{X}", "{X} is {w}.", "It is {X}."),
        ("{X} is {w} in the room than {Y}.", "By height in the real scene, {X} is {w} than {Y}.",
         "Of {and}, {X} is {w}, by height in the room."),
    ),
    "point_distance": Phrases(
        ("How far is {A} from the camera?", "What is the distance from the camera to {A}?",
         "From where the camera stands, how far away is {A}?"),
        ("{n}", "It is about {n} from the camera.", "{A} is about {n} away."),
        ("{A} is about {n} from the camera.", "The distance from the camera to {A} is about {n}.",
         "From where the camera stands, {A} is about {n} away."),
    ),
    "point_position": Phrases(
        ("What is the 3D position of {A} in the camera's frame (x right, y down, z forward)?",
         "Give the camera coordinates (x right, y down, z forward) of {A}.",
         "With x to the right, y down and z forward from the camera, where in 3D is {A}?"),
        ("{n}", "It is at {n}.", "{A} is at about {n}."),
        ("With x right, y down and z forward from the camera, {A} is at about {n}.",
         "The camera coordinates (x right, y down, z forward) of {A} are about {n}.",
         "In the camera's frame (x right, y down, z forward), {A} lies at about {n}."),
    ),
    "points_apart": Phrases(
        ("How far apart are {A} and {B} in 3D?", "What is the 3D distance between {A} and {B}?",
         "In the real scene, how far is {A} from {B}?"),
        ("{n}", "They are about {n} apart.", "The distance is about {n}."),
        ("In 3D, {A} and {B} are about {n} apart.", "The 3D distance between {A} and {B} is about {n}.",
         "In the real scene, {A} is about {n} from {B}."),
    ),
    "point_height": Phrases(
        ("How high above the floor is {A}?", "What is the height of {A} above the floor?",
         "Measured from the floor, how high up is {A}?"),
        ("{n}", "It is about {n} above the floor.", "{A} is about {n} above the floor."),
        ("{A} is about {n} above the floor.", "The height of {A} above the floor is about {n}.",
         "Measured from the floor, {A} is about {n} up."),
    ),
    # -- level 1: one object
    "distance_from_camera": Phrases(
        ("How far is {A} from the camera, at its nearest visible point?",
         "What is the distance from the camera to the nearest visible point of {A}?",
         "How far away is the part of {A} that is closest to the camera?"),
        ("{n}", "It is about {n} away.", "{A} is about {n} from the camera."),
        ("At its nearest visible point, {A} is about {n} from the camera.",
         "The distance from the camera to the nearest visible point of {A} is about {n}.",
         "The part of {A} that is closest to the camera is about {n} away."),
    ),
    "height": Phrases(
        ("How tall is {A}?", "What is the height of {A}?", "How much does {A} measure from bottom to top?"),
        ("{n}", "It is about {n} tall.", "{A} is about {n} tall."),
        ("{A} is about {n} tall.", "The height of {A} is about {n}.", "From bottom to top, {A} measures about {n}."),
    ),
    "width": Phrases(
        ("How wide is {A}, measured along its shorter horizontal side?",
         "What is the width of {A}, its shorter horizontal side?", "How long is the shorter horizontal side of {A}?"),
        ("{n}", "It is about {n} wide.", "{A} is about {n} wide."),
        ("Along its shorter horizontal side, {A} is about {n} wide.",
         "The width of {A}, its shorter horizontal side, is about {n}.",
         "The shorter horizontal side of {A} measures about {n}."),
    ),
    "length": Phrases(
        ("How long is {A}, measured along its longer horizontal side?",
         "What is the length of {A}, its longer horizontal side?", "How long is the longer horizontal side of {A}?"),
        ("{n}", "It is about {n} long.", "{A} is about {n} long."),
        ("Along its longer horizontal side, {A} is about {n} long.",
         "The length of {A}, its longer horizontal side, is about {n}.",
         "The longer horizontal side of {A} measures about {n}."),
    ),
    "top_height": Phrases(
        ("How high above the floor is the top of {A}?", "Up to which height above the floor does {A} reach?",
         "What is the height of the top of {A} above the floor?"),
        ("{n}", "It is about {n} above the floor.", "The top of {A} is about {n} above the floor."),
        ("The top of {A} is about {n} above the floor.", "{A} reaches up to about {n} above the floor.",
         "The highest point of {A} is about {n} above the floor."),
    ),
    "position": Phrases(
        ("Where is the centre of {A} as seen from the camera: how far to the side, and how far ahead?",
         "How far to the left or right of the camera is the centre of {A}, and how far ahead?",
         "Give the position of the centre of {A} relative to the camera, sideways and ahead."),
        ("{n}", "It is {n}.", "The centre of {A} is about {n}."),
        ("The centre of {A} is about {n} of the camera.", "Relative to the camera, the centre of {A} is about {n}.",
         "Seen from above, the centre of {A} lies about {n} of the camera."),
    ),
    "bearing": Phrases(
        ("By how many degrees, and to which side, must the camera turn to face the centre of {A}?",
         "Kept level, how many degrees must the camera turn, and to which side, to face the centre of {A}?",
         "In which direction from straight ahead is the centre of {A}, in degrees to the left or right?"),
        ("{n}", "It is {n}.", "About {n}."),
        ("To face the centre of {A}, the camera must turn by about {n}.",
         "Seen from above, the centre of {A} is about {n} of straight ahead.",
         "The camera would look straight at the centre of {A} after turning by about {n}."),
    ),
    "image_third": Phrases(
        ("In which third of the image is the middle of {A}: left, middle or right?",
         "Is the middle of {A} in the left, middle or right third of the image?",
         "Divide the image into a left, a middle and a right third. Which one has the middle of {A}?"),
        ("{s}", "It is in the {w} third.", "The middle of {A} is in the {w} third of the image."),
        ("The middle of {A} is in the {w} third of the image.", "The {w} third of the image has the middle of {A}.",
         "Of the image's three thirds from left to right, the {w} one has the middle of {A}."),
    ),
    "taller_than_long": Phrases(
        ("Is {A} taller than its longer horizontal side?", "Is the height of {A} larger than its horizontal length?",
         "Does {A} measure more from bottom to top than along its longer horizontal side?"),
        ("{s}", "{s}, it is {w} it is long.", "{s}, {A} is {w} it is long."),
        ("{A} is {w} it is long.", "By height and longer horizontal side, {A} is {w} it is long.",
         "Measured from bottom to top, {A} is {w} it is long horizontally."),
    ),
    # -- level 2: two objects
    "left_right": Phrases(
        ("Is {A} to the left or to the right of {B}?", "From the camera's view, on which side of {B} is {A}?",
         "Seen from the camera, is {A} left or right of {B}?"),
        ("{s}", "{A} is {w} {B}.", "It is {w} {B}."),
        ("{A} is {w} {B}.", "From the camera's view, {A} is {w} {B}.", "Seen from the camera, {A} lies {w} {B}."),
    ),
    "above_below": Phrases(
        ("Is {A} above or below {B}?", "Does {A} lie above or below {B} in the room?",
         "By height in the room, is {A} above {B} or below it?"),
        ("{s}", "{A} is {w} {B}.", "It is {w} {B}."),
        ("{A} is {w} {B}.", "By height in the room, {A} is {w} {B}.", "{A} lies {w} {B} in the room."),
    ),
    "front_behind": Phrases(
        ("Is {A} in front of {B} or behind it, seen from the camera?",
         "Looking the way the camera looks, is {A} in front of or behind {B}?",
         "From the camera's view, does {A} lie in front of {B} or behind it?"),
        ("{s}", "{A} is {w} {B}.", "It is {w} {B}."),
        ("Seen from the camera, {A} is {w} {B}.", "Looking the way the camera looks, {A} is {w} {B}.",
         "From the camera's view, {A} lies {w} {B}."),
    ),
    "north_south": Phrases(
        (f"{NORTH} In the first image, is {{A}} north or south of {{B}}?",
         "Call the direction in which the second image looks north. Is {A} of the first image north or south of {B}?",
         f"{NORTH} Does {{A}} of the first image lie to the north or to the south of {{B}}?"),
        ("{s}", "{A} is {w} {B}.", "It is {w} {B}."),
        (f"{NORTH} {{A}} of the first image is {{w}} {{B}}.",
         "If the camera of the second image faces north, {A} of the first image is {w} {B}.",
         "With north being where the second image looks, {A} of the first image lies {w} {B}."),
    ),
    "east_west": Phrases(
        (f"{NORTH} In the first image, is {{A}} east or west of {{B}}?",
         "Call the direction in which the second image looks north. Is {A} of the first image east or west of {B}?",
         f"{NORTH} Does {{A}} of the first image lie to the east or to the west of {{B}}?"),
        ("{s}", "{A} is {w} {B}.", "It is {w} {B}."),
        (f"{NORTH} {{A}} of the first image is {{w}} {{B}}.",
         "If the camera of the second image faces north, {A} of the first image is {w} {B}.",
         "With north being where the second image looks, {A} of the first image lies {w} {B}."),
    ),
    "nearer": Phrases(
        ("Which is {w} the camera, {or}?", "Of {and}, which one is {w} the camera?",
         "By its nearest visible point, which is {w} the camera: {or}?"),
        ("{X}", "{X} is {w} the camera.", "{X} is {w} the camera than {Y}."),
        ("{X} is {w} the camera than {Y}.", "Compared with {Y}, {X} is {w} the camera.",
         "Of {and}, {X} is {w} the camera."),
    ),
    "reaches_higher": Phrases(
        ("Which has its top {w} in the room, {or}?", "Whose top is {w}, {or}?",
         "Of {and}, which has the {w} top?"),
        ("{X}", "The top of {X} is {w}.", "The top of {X} is {w} than that of {Y}."),
        ("The top of {X} is {w} than that of {Y}.", "Compared with {Y}, {X} has a {w} top.",
         "Of {and}, {X} has the {w} top."),
    ),
    "taller": Phrases(
        ("Which is {w}, {or}?", "Of {and}, which one is {w}?", "Measured from bottom to top, which is {w}: {or}?"),
        ("{X}", "{X} is {w}.", "{X} is {w} than {Y}."),
        ("{X} is {w} than {Y}.", "Compared with {Y}, {X} is {w}.", "Of {and}, {X} is the {w} one."),
    ),
    "wider": Phrases(
        ("Which is {w} along its shorter horizontal side, {or}?",
         "Of {and}, which one is {w}, going by the shorter horizontal side?",
         "Going by width, the shorter horizontal side, which is {w}: {or}?"),
        ("{X}", "{X} is {w}.", "{X} is {w} than {Y}."),
        ("{X} is {w} than {Y} along its shorter horizontal side.",
         "By the shorter horizontal side, {X} is {w} than {Y}.",
         "Of {and}, {X} is the {w} one, going by the shorter horizontal side."),
    ),
    "longer": Phrases(
        ("Which has the {w} length, {or}, measured along the longer horizontal side?",
         "Of {and}, which one has the {w} length, going by the longer horizontal side?",
         "Going by the longer horizontal side, which has the {w} length: {or}?"),
        ("{X}", "{X} has the {w} length.", "{X} has a {w} length than {Y}."),
        ("{X} has a {w} length than {Y}, measured along the longer horizontal side.",
         "Going by the longer horizontal side, {X} has a {w} length than {Y}.",
         "Of {and}, {X} has the {w} length, going by the longer horizontal side."),
    ),
    "bigger": Phrases(
        ("Which is {w} by the volume of its bounding box, {or}?", "Of {and}, which one has the {w} bounding box?",
         "Going by the space a tight box around it would take, which is {w}: {or}?"),
        ("{X}", "{X} is {w}.", "{X} is {w} than {Y}."),
        ("By the volume of its bounding box, {X} is {w} than {Y}.", "The bounding box of {X} is {w} than that of {Y}.",
         "Of {and}, {X} has the {w} bounding box."),
    ),
    "distance": Phrases(
        ("How far are the centres of {A} and {B} apart?", "What is the distance between the centres of {A} and {B}?",
         "From centre to centre, how far is {A} from {B}?"),
        ("{n}", "They are about {n} apart.", "The distance is about {n}."),
        ("The centres of {A} and {B} are about {n} apart.",
         "The distance between the centres of {A} and {B} is about {n}.",
         "From centre to centre, {A} is about {n} from {B}."),
    ),
    "horizontal_distance": Phrases(
        ("How far apart are the centres of {A} and {B} horizontally?",
         "What is the horizontal distance between the centres of {A} and {B}?",
         "Seen from above, how far is the centre of {A} from that of {B}?"),
        ("{n}", "They are about {n} apart horizontally.", "The horizontal distance is about {n}."),
        ("Horizontally, the centres of {A} and {B} are about {n} apart.",
         "The horizontal distance between the centres of {A} and {B} is about {n}.",
         "Seen from above, the centre of {A} is about {n} from that of {B}."),
    ),
    "vertical_distance": Phrases(
        ("How far apart are the centres of {A} and {B} vertically?",
         "What is the difference in height between the centres of {A} and {B}?",
         "Vertically, how far is the centre of {A} from that of {B}?"),
        ("{n}", "They are about {n} apart vertically.", "The difference in height is about {n}."),
        ("Vertically, the centres of {A} and {B} are about {n} apart.",
         "The difference in height between the centres of {A} and {B} is about {n}.",
         "The vertical distance between the centres of {A} and {B} is about {n}."),
    ),
    "clock": Phrases(
        ("If 12 o'clock is the way the camera looks, in which clock direction from {A} is {B}?",
         "Standing at {A} and facing the way the camera does (12 o'clock), at which hour do you see {B}?",
         "Seen from above with 12 o'clock ahead of the camera, at which hour from {A} is {B}?"),
        ("{n}", "It is at {n}.", "{B} is at {n} from {A}."),
        ("If 12 o'clock is the way the camera looks, {B} is at {n} from {A}.",
         "Standing at {A} and facing the way the camera does (12 o'clock), you see {B} at {n}.",
         "Seen from above with 12 o'clock ahead of the camera, {B} is at {n} from {A}."),
    ),
    "height_ratio": Phrases(
        ("How many times as tall as {B} is {A}?", "The height of {A} is how many times that of {B}?",
         "What is the height of {A} divided by that of {B}?"),
        ("{n}", "It is about {n} as tall.", "{A} is about {n} as tall as {B}."),
        ("{A} is about {n} as tall as {B}.", "The height of {A} is about {n} that of {B}.",
         "Measured from bottom to top, {A} is about {n} as tall as {B}."),
    ),
}  # fmt: skip
