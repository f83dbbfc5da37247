"""The built-in words of the policies, in English. Few on purpose: an operator knows better what is meant."""

from __future__ import annotations

from collections.abc import Mapping

#: What `moderate` refuses, and `strict` with it.
MODERATE: Mapping[str, tuple[str, ...]] = {
    "sexual": (
        *("porn*", "hentai", "nsfw", "xxx", "hardcore sex", "having sex", "sex scene*", "sex act*"),
        *("sexual intercourse", "sexual act*", "sexually explicit", "blowjob*", "blow job*", "handjob*"),
        *("cumshot*", "gangbang*", "gang bang*", "fellatio", "cunnilingus", "masturbat*", "orgasm*"),
        *("ejaculat*", "bukkake", "dildo*", "butt plug*", "penis", "penises", "vagina*", "genital*"),
    ),
    "sexual violence": (
        *("rape", "raped", "raping", "rapist*", "sexual assault*", "sexual abuse", "sexually abused"),
        *("bestiality", "zoophil*", "necrophil*", "incest*", "nonconsensual", "non consensual"),
    ),
    "gore": (
        *("gory", "blood and gore", "extreme gore", "dismember*", "decapitat*", "behead*", "disembowel*"),
        *("eviscerat*", "mutilat*", "severed head*", "severed limb*", "snuff film*", "rotting corpse*"),
    ),
    "self-harm": (
        *("self harm*", "selfharm*", "kill myself", "cutting myself", "cutting herself", "cutting himself"),
        *("suicide method*", "commit suicide", "committing suicide", "suicide note*", "hanging himself"),
        *("hanging herself", "slit wrists", "slitting wrists"),
    ),
    "hate": (
        *("white power", "white supremac*", "heil hitler", "sieg heil", "ethnic cleansing", "race war"),
        *("ku klux klan", "subhuman*", "untermensch*", "master race"),
    ),
    "weapons of mass harm": (
        *("pipe bomb*", "nail bomb*", "dirty bomb*", "build a bomb", "make a bomb", "making a bomb"),
        *("nerve agent*", "ricin", "sarin", "mustard gas", "molotov cocktail*", "improvised explosive*"),
        *("chemical weapon*", "biological weapon*", "bioweapon*", "ghost gun*"),
    ),
}

#: What `strict` refuses beside that.
STRICT: Mapping[str, tuple[str, ...]] = {
    "nudity": (
        *(
            "nude",
            "nudes",
            "nudity",
            "naked",
            "topless",
            "undress*",
            "striptease*",
            "strip tease*",
            "lingerie",
        ),
        *("underwear", "panties", "bikini*", "cleavage", "bare breasts", "big breasts", "huge breasts"),
        *("nipple*", "buttocks", "erotic*", "sex", "sexy", "sexual", "seductive*", "sensual*", "fetish*"),
        *("bdsm", "bondage", "lewd*"),
    ),
    "violence": (
        *("bloody", "bloodied", "bloodstain*", "blood stain*", "blood splatter*", "pool of blood"),
        *("covered in blood", "dripping blood", "bleeding", "corpse*", "cadaver*", "dead body"),
        *("dead bodies", "murder*", "kill", "killed", "killing", "slaughter*", "massacre*", "tortur*"),
        *("stabbed", "stabbing"),
        *("gunshot*", "assassinat*", "suicide", "hanged", "lynch", "lynched", "lynching"),
    ),
    "weapons": (
        *("gun", "guns", "handgun*", "pistol*", "rifle*", "shotgun*", "machine gun*", "grenade*"),
        *("bomb", "bombs", "bombing", "explosives"),
    ),
    "drugs": (
        *("cocaine", "heroin", "methamphetamine*", "crystal meth", "fentanyl", "ketamine", "lsd", "mdma"),
        *("crack pipe*", "drug use", "injecting drugs", "bong"),
    ),
    "profanity": (
        *("fuck*", "motherfuck*", "shit", "shits", "shitty", "bullshit", "cunt*", "asshole*", "bitch"),
        *("bitches", "bastard", "bastards"),
    ),
}
