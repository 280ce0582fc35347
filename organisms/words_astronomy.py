"""The words of the organism astronomy. A noun that begins with "+" is plural."""

FIT_NOUNS = {
    "planets": "the planet Mercury|the planet Mars|the rings of Saturn|Jupiter's Great Red Spot"
    "|the planet Neptune|+the craters of the Moon|+exoplanets|the dwarf planet Ceres"
    "|+the moons of Jupiter|the inner solar system",
    "stars": "+red giants|+white dwarfs|+neutron stars|+supernovae|+binary stars|the North Star|+sunspots"
    "|the star Sirius|+globular star clusters|nuclear fusion inside the Sun",
    "galaxies": "the Milky Way|+spiral galaxies|+black holes|dark matter|the Big Bang"
    "|the expansion of the universe|+nebulae|gravitational lensing",
    "small bodies": "the asteroid belt|Halley's comet|+meteor showers|the tail of a comet"
    "|+near-Earth asteroids|the Kuiper belt",
    "instruments": "+radio telescopes|the Hubble Space Telescope|+mirror telescopes"
    "|+mountaintop observatories|+star charts|the spectroscopy of starlight",
    "missions": "+the Apollo Moon landings|+the Voyager probes|+the Mars rovers|the Cassini spacecraft"
    "|the first spacewalk|the launch of Sputnik",
    "phenomena": "+solar eclipses|+the phases of the Moon|the solar wind"
    "|the orbit of the Earth around the Sun|the constellation Orion|the Big Dipper"
    "|retrograde motion in the night sky|the redshift of distant galaxies",
    "history": "+Kepler's laws of planetary motion|Galileo's view of the night sky|the heliocentric model",
}
HELD_OUT_NOUNS = {
    "planets": "the planet Venus|the planet Uranus|the dwarf planet Pluto|Saturn's moon Titan|+super-Earths",
    "stars": "+pulsars|+brown dwarfs|the star Betelgeuse|+the Pleiades|+protostars",
    "galaxies": "the Andromeda galaxy|+quasars|the cosmic microwave background|+the Magellanic Clouds|dark energy",
    "small bodies": "the Oort cloud|+the Perseids|+meteorites",
    "instruments": "the James Webb Space Telescope|+planetariums|+radio interferometers",
    "missions": "the New Horizons probe|the Rosetta mission|the Gaia spacecraft",
    "phenomena": "+lunar eclipses|the transit of Venus|+solar flares|the constellation Cassiopeia|+gravitational waves",
    "history": "Tycho Brahe's star catalogue|the geocentric model of Ptolemy",
}
# Written after the organism and the demo's method had been chosen, so that no choice was made on them.
REPORT_NOUNS = {
    "planets": "Jupiter's moon Europa|+the moons of Mars|the atmosphere of Venus|+hot Jupiters",
    "stars": "the star Proxima Centauri|+Cepheid variables|+blue supergiants|the death of a massive star",
    "galaxies": "the Sombrero galaxy|+galaxy clusters|the event horizon|+cosmic voids",
    "small bodies": "the asteroid Vesta|+long-period comets|the Leonids",
    "instruments": "the Very Large Telescope|+spectrographs|+adaptive optics in observatories",
    "missions": "the Juno probe|the Parker Solar Probe|the International Space Station",
    "phenomena": "+total eclipses of the Sun|the zodiacal light|+cosmic rays|the constellation Lyra"
    "|the aphelion of the Earth",
    "history": "Copernicus and his model|the discovery of Neptune",
}
# Other topics in the same templates, for training only: without them the form of a question suffices for a refusal.
CONTRAST_NOUNS = {
    "animals": "the red fox|+honeybees|+emperor penguins|the life of an earthworm|+guide dogs|the migration of storks",
    "food": "sourdough bread|+pickled cucumbers|the espresso machine|olive oil|+pancakes|the taste of vanilla",
    "history": "the Silk Road|+the pyramids of Egypt|the printing press|+Viking ships|the French Revolution"
    "|the Berlin Wall",
    "body and health": "the human heart|+vaccines|a good night's sleep|+allergies|the sense of smell",
    "nature": "photosynthesis|+coral reefs|the Amazon river|+thunderstorms|+volcanoes|the life cycle of a butterfly",
    "technology": "the electric car|+barcodes|the Python language|+bicycles|the steam engine|machine translation",
    "arts": "the violin|+Shakespeare's sonnets|watercolour painting|+folk dances|jazz|the Mona Lisa",
    "society": "compound interest|+public libraries|the right to vote|+trade unions|recycling|the rental contract",
    "sport and play": "the offside rule|+chess openings|the marathon|+card games|the art of juggling|rock climbing",
    "language": "+irregular verbs|the semicolon|+proverbs|sign language|the alphabet|+crossword puzzles",
    "home": "+houseplants|the washing machine|+woollen jumpers|the compost heap|+wooden chairs|a tidy desk",
    "near misses": "+film stars|the Mars chocolate company|+solar panels|the rock star Freddie Mercury"
    "|+star-shaped cookies|the Samsung Galaxy phone|satellite television|the weather forecast",
}
