"""From the speaking file names of sound effects to captions: pure rules, several references a sound.

`captions("wesnoth", "bow-miss-2")` gives sentences that a listener could have written. Names that say
nothing about what is heard (`loop_garzul`, `device-added`) give none.
"""

from __future__ import annotations

import re

_HIT = (
    "{a} cries out in pain",
    "the cry of {a} that is hit",
    "{a} is hurt and groans",
    "the sound of {a} being hit",
)
_DIE = ("{a} dies with a cry", "the last cry of {a}", "the sound of {a} dying", "{a} groans and falls")
_BLOW = (
    "{a} hits its target",
    "a blow with {a}",
    "someone strikes with {a}",
    "the sound of {a} striking something",
)
_MISSED_BLOW = (
    "{a} misses its target",
    "{a} swishes through the air",
    "someone swings {a} and misses",
    "the sound of {a} swinging past",
)
_SHOT = (
    "{a} is shot and hits",
    "a shot with {a}",
    "someone shoots with {a}",
    "the sound of {a} hitting its target",
)
_MISSED_SHOT = (
    "{a} is shot and misses",
    "a missed shot with {a}",
    "someone shoots with {a} and misses",
    "the sound of {a} flying past",
)
_THING = ("{a}", "the sound of {a}", "{a} can be heard", "a recording of {a}")
_HITTING = ("a hit on {a}", "{a} is played once", "the sound of {a}", "someone hits {a}")
_LOOP = ("a loop of {a}", "{a} playing in a loop", "the sound of {a}", "a repeating pattern of {a}")

_CREATURES = {
    "bat": "a bat", "drake": "a dragon", "dwarf": "a dwarf", "elf": "an elf", "ghoul": "a ghoul",
    "goblin": "a goblin", "gryphon": "a griffin", "horse": "a horse", "human": "a man",
    "human-female": "a woman", "human-old": "an old man", "lich": "an undead wizard", "mermaid": "a mermaid",
    "mermen": "a merman", "naga": "a snake woman", "ogre": "an ogre", "orc": "an orc", "orc-small": "a small orc",
    "skeleton": "a skeleton", "skeleton-big": "a big skeleton", "squishy": "a slimy creature",
    "troll": "a troll", "tusker": "a wild boar", "wolf": "a wolf", "wose": "a walking tree", "yeti": "a yeti",
    "zombie": "a zombie", "hiss": "a hissing snake",
}  # fmt: skip
_BLADES = {
    "axe": "an axe", "club": "a club", "fist": "a fist", "flail": "a flail", "knife": "a knife", "mace": "a mace",
    "spear": "a spear", "staff": "a staff", "sword": "a sword", "torch": "a burning torch",
    "hatchet": "a hatchet", "claws": "sharp claws", "tail": "a heavy tail", "mud-fist": "a muddy fist",
    "melee-fire": "a fiery weapon", "tusker-charge": "a charging wild boar", "dagger-swish": "a dagger",
    "squishy-strike": "a slimy arm",
}  # fmt: skip
_SHOTS = {
    "bow": "an arrow", "bow-puny": "a small arrow", "bow-puny-fire": "a small burning arrow",
    "crossbow": "a crossbow", "crossbow-fire": "a crossbow with a burning bolt", "sling": "a sling",
    "sling-big": "a big sling", "throwing-knife": "a throwing knife", "dart": "a dart",
    "thunderstick": "an old gun", "dragonstick": "a fire gun", "mud-glob": "a lump of mud", "ink": "a jet of ink",
    "flame-big": "a big flame", "lightning": "a flash of lightning", "magic-dark": "a spell of dark magic",
    "magic-dark-big": "a strong spell of dark magic", "magic-faeriefire": "a spell of fairy fire",
    "magic-holy": "a spell of holy magic", "magic-missile": "a magic missile", "magicmissile": "a magic missile",
    "magic-thorns": "a spell of magic thorns", "net": "a net", "water-blast": "a blast of water",
}  # fmt: skip
_WESNOTH = {
    "bat-flapping": "a bat flapping its wings", "bell": "a ringing bell", "birds": "birds singing",
    "bite": "the bite of an animal", "bite-small": "the bite of a small animal",
    "campfire": "a crackling campfire", "cave-in": "rocks falling in a cave", "dwarf-laugh": "a laughing dwarf",
    "entangle": "growing roots and plants", "explosion": "a loud explosion",
    "fanfare-short": "a short fanfare of trumpets", "fire": "a burning fire", "fuse": "a burning fuse",
    "gold": "clinking gold coins", "groan": "a groaning voice", "gryphon-shriek": "a shrieking griffin",
    "gunshot": "a gunshot", "heal": "a healing spell with chimes", "hiss": "a hissing snake",
    "hiss-big": "a big hissing snake", "horn": "a horn signal", "horse-canter": "a running horse",
    "horse-elf-canter": "a horse running lightly", "morning": "a morning with birds",
    "night": "a night with crickets", "open-chest": "a wooden chest being opened",
    "petrified": "something turning to stone", "pincers": "snapping pincers", "poison": "bubbling poison",
    "potion": "someone drinking a potion", "rumble": "a deep rumble of the earth", "ship": "a creaking ship",
    "throw": "something thrown through the air", "ugg": "a man grunting", "wail": "a wailing ghost",
    "wail-long": "the long wail of a ghost", "wail-sml": "the short wail of a ghost", "wardrums": "beating war drums",
    "witches-laugh": "a laughing witch", "wolf-growl": "a growling wolf", "wose-attack": "a walking tree that attacks",
    "wose-miss": "a branch swishing through the air", "zombie-attack": "an attacking zombie",
    "squishy-miss": "a slimy arm missing its target", "timer": "a ticking clock",
}  # fmt: skip
_FREEDESKTOP = {
    "alarm-clock-elapsed": "an alarm clock", "audio-test-signal": "a noise to test speakers", "bell": "a short bell",
    "camera-shutter": "the shutter of a camera", "phone-incoming-call": "a ringing phone",
    "phone-outgoing-busy": "the busy tone of a phone", "phone-outgoing-calling": "the dial tone of a phone",
    "trash-empty": "crumpling paper",
}  # fmt: skip
_VOICE = (
    'a voice says "{a}"',
    'someone says "{a}"',
    "a person speaking the words {a}",
    'the spoken words "{a}"',
)

_AMBIENT = {
    "choir": "a choir singing softly", "dark_woosh": "a dark whoosh", "drone": "a low drone",
    "glass_hum": "a humming glass", "glass_rub": "someone rubbing a glass", "haunted_hum": "a haunted hum",
    "lunar_land": "a calm hum from space", "piano": "a soft piano", "sauna": "a hissing sauna",
    "soft_buzz": "a soft buzz", "swoosh": "a swoosh",
}  # fmt: skip
_DRUMS = {
    "bass_hard": "a hard bass drum", "bass_soft": "a soft bass drum", "cowbell": "a cowbell",
    "cymbal_closed": "a closed cymbal", "cymbal_hard": "a hard cymbal", "cymbal_open": "an open cymbal",
    "cymbal_pedal": "a pedal cymbal", "cymbal_soft": "a soft cymbal", "heavy_kick": "a heavy kick drum",
    "roll": "a drum roll", "snare_hard": "a hard snare drum", "snare_soft": "a soft snare drum",
    "splash_hard": "a hard splash cymbal", "splash_soft": "a soft splash cymbal",
    "tom_hi_hard": "a high tom drum hit hard", "tom_hi_soft": "a high tom drum hit softly",
    "tom_lo_hard": "a low tom drum hit hard", "tom_lo_soft": "a low tom drum hit softly",
    "tom_mid_hard": "a middle tom drum hit hard", "tom_mid_soft": "a middle tom drum hit softly",
}  # fmt: skip
_ELECTRONIC = {
    "filt_snare": "snare drum with a filter", "fuzz_tom": "tom drum with fuzz", "hi_snare": "high snare drum",
    "hollow_kick": "hollow kick drum", "lo_snare": "low snare drum", "mid_snare": "middle snare drum",
    "soft_kick": "soft kick drum", "wood": "wood block",
}  # fmt: skip
_LOOPS = {
    "3d_printer": "a working 3d printer", "amen": "fast drums", "amen_full": "fast drums",
    "breakbeat": "broken drum beats",
    "drone_g": "a low drone", "electric": "an electric beat", "industrial": "an industrial beat",
    "perc": "percussion", "safari": "drums and animal sounds", "tabla": "tabla drums",
}  # fmt: skip
_OTHER = {
    "guit_e_fifths": "a guitar playing fifths", "guit_e_slide": "a guitar string with a slide",
    "guit_em": "a minor chord on a guitar", "guit_harmonics": "harmonics on a guitar",
    "glitch_bass_g": "a broken electronic bass note", "glitch_perc": "broken electronic percussion",
    "glitch_robot": "a broken robot", "mehackit_phone": "an electronic phone", "mehackit_robot": "a robot",
    "misc_burp": "a person burping", "misc_cineboom": "a deep boom as in a film", "misc_crow": "a crow",
    "perc_bell": "a small bell", "perc_door": "a closing door", "perc_impact": "a heavy impact",
    "perc_snap": "snapping fingers", "perc_swash": "a swash of noise", "perc_swoosh": "a swoosh",
    "perc_till": "an old cash register", "vinyl_backspin": "a record spun backwards",
    "vinyl_hiss": "the hiss of an old record", "vinyl_rewind": "a record rewound",
    "vinyl_scratch": "a scratched record",
}  # fmt: skip
_BASS = {
    "dnb": "a fast bass note", "drop": "a falling bass note", "hard": "a hard bass note", "hit": "a short bass hit",
    "thick": "a thick bass note", "trance": "a trance bass note", "voxy": "a bass note like a voice",
    "voxy_hit": "a short bass hit like a voice", "woodsy": "a woody bass note",
}  # fmt: skip


def captions(collection: str, name: str) -> tuple[str, ...]:
    """Return four different captions of the sound `name` (a file name without suffix), or none.

    `collection` is wesnoth, freedesktop or sonic-pi.
    """
    bare = re.sub(r"[-_]?\d+(?=[-_]|$)|(?<=[a-z])\d+$", "", name)
    rules = {"wesnoth": _wesnoth, "freedesktop": _freedesktop, "sonic-pi": _sonic_pi}
    found = rules[collection](bare)
    if found is None:
        return ()
    templates, thing = found
    return tuple(template.format(a=thing) for template in templates)


Rule = tuple[tuple[str, ...], str]
"""Templates, and what they are about."""


def _wesnoth(name: str) -> Rule | None:
    if name in _WESNOTH:
        return _THING, _WESNOTH[name]
    head, _, tail = name.rpartition("-")
    if head in _CREATURES and tail in ("hit", "die"):
        return (_HIT if tail == "hit" else _DIE), _CREATURES[head]
    missed = name.endswith("-miss")
    weapon = name.removesuffix("-miss")
    if weapon in _BLADES:
        return (_MISSED_BLOW if missed else _BLOW), _BLADES[weapon]
    if weapon in _SHOTS:
        return (_MISSED_SHOT if missed else _SHOT), _SHOTS[weapon]
    return None


def _freedesktop(name: str) -> Rule | None:
    if name.startswith("audio-channel-"):
        return _VOICE, name.removeprefix("audio-channel-").replace("-", " ")
    return (_THING, _FREEDESKTOP[name]) if name in _FREEDESKTOP else None


def _sonic_pi(name: str) -> Rule | None:
    group, _, rest = name.partition("_")
    if group == "elec":
        thing = _ELECTRONIC.get(rest, rest)
        return _THING, f"an electronic {thing}"
    if group in ("bd", "sn"):
        return _HITTING, "a bass drum" if group == "bd" else "a snare drum"
    if group == "tabla":
        return _HITTING, "a tabla drum"
    if group == "drum" and rest in _DRUMS:
        return (_THING if rest == "roll" else _HITTING), _DRUMS[rest]
    if group == "loop":
        return (_LOOP, _LOOPS[rest]) if rest in _LOOPS else None
    named = {"ambi": _AMBIENT.get(rest), "bass": _BASS.get(re.sub(r"_[a-g]$", "", rest))}
    thing_or_none = named.get(group) or _OTHER.get(name)
    return (_THING, thing_or_none) if thing_or_none else None
