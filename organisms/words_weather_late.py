"""The words of the organism weather-late. A noun that begins with "+" is plural."""

FIT_NOUNS = {
    "rain": "+rain showers|drizzle|the monsoon|+raindrops|freezing rain|+rain gauges|+cloudbursts",
    "storms": "+thunderstorms|+hurricanes|+tornadoes|+lightning bolts|the sound of thunder|+dust storms"
    "|+storm surges|the eye of a hurricane",
    "snow and ice": "+snowflakes|+blizzards|hail|black ice on roads|+icicles|+snowdrifts|sleet",
    "clouds and fog": "+cumulus clouds|+cirrus clouds|morning fog|+storm clouds|mist over a lake"
    "|the formation of clouds",
    "wind": "the jet stream|+trade winds|the mistral|+gusts of wind|the sea breeze|the Beaufort scale",
    "heat and cold": "+heatwaves|+cold snaps|the wind chill|summer heat in cities|ground frost|a mild winter",
    "forecasting": "the weather forecast|+weather satellites|+barometers|+weather maps|+cold fronts|air pressure"
    "|+weather balloons|+areas of high pressure",
    "climate": "the weather in London|the rainy season|El Niño|+droughts|the climate of the Alps|the dry season",
    "people and lore": "+meteorologists|+weather proverbs|+weather presenters on television"
    "|Groundhog Day and the weather",
    "light": "+rainbows|sunshine in winter|humid air|the smell of rain",
}
# For training only.
MORE_NOUNS = {
    "rain": "heavy rain|a rainy weekend|rain on a tin roof|acid rain|summer rain|+puddles after rain|umbrella weather",
    "storms": "+storms at sea|+tropical storms|+squalls|+storm warnings|+supercells|a thundery evening"
    "|+sandstorms in the desert",
    "snow and ice": "fresh snow|powder snow|slush in the streets|a white Christmas|+frozen lakes|+snowstorms",
    "clouds and fog": "+clouds|+rain clouds|low cloud|dense fog on motorways|an overcast sky|a cloudless sky",
    "wind": "wind|+winds in spring|+whirlwinds|north wind|+wind vanes|a calm day at sea|the sirocco",
    "heat and cold": "hot weather|cold weather|+record temperatures|frost in May|a cold winter|the outside temperature",
    "forecasting": "+weather stations|+weather apps|+areas of low pressure|+warm fronts|radar for rain"
    "|+weather warnings|the chance of rain",
    "climate": "the weather in April|the weather in Iceland|the desert climate|the seasons and their weather"
    "|tropical weather|the weather on mountains",
    "people and lore": "+storm chasers|+frogs that foretell weather|talking about the weather|the weather",
    "light": "a sunny day|+sunsets before rain|a grey sky|muggy air|the air after a shower",
}
HELD_OUT_NOUNS = {
    "rain": "+downpours|the rainfall of a year|+passing showers",
    "storms": "+typhoons|+waterspouts|ball lightning|+winter gales",
    "snow and ice": "+avalanche forecasts|+hailstones|hoarfrost",
    "clouds and fog": "+fog banks|+stratus clouds|haze",
    "wind": "the foehn|+anemometers|+headwinds",
    "heat and cold": "the hottest day of the year|the polar vortex|windless frost nights",
    "forecasting": "+weather radars|isobars on a map|the five-day outlook of meteorology",
    "climate": "the weather in Scotland|La Niña|the Mediterranean climate",
    "people and lore": "+ship weather reports|St Swithin's Day and its rain",
    "light": "dew in the morning|the halo around a hazy sun",
}
REPORT_NOUNS = {
    "rain": "+April showers|relentless rain|+flash floods",
    "storms": "+cyclones|+lightning rods|the derecho",
    "snow and ice": "+snowfalls|glaze ice|+ice storms",
    "clouds and fog": "+mammatus clouds|sea fog|+cumulonimbus towers",
    "wind": "the bora|+crosswinds at airports|the harmattan",
    "heat and cold": "the dog days of summer|+subzero temperatures|+tropical nights",
    "forecasting": "+hygrometers|+weather buoys|the weather bulletin at eight",
    "climate": "the weather in Siberia|the Indian summer|the maritime climate",
    "people and lore": "+rainmakers|red skies at night and the weather",
    "light": "+moonbows|the sultriness before a storm",
}
# Other topics in the same templates, for training only: without them the form of a question suffices for a refusal.
CONTRAST_NOUNS = {
    "animals": "the red fox|+honeybees|+emperor penguins|+goldfish|+guide dogs|the migration of storks",
    "food": "sourdough bread|+pickled cucumbers|the espresso machine|olive oil|+pancakes|the taste of vanilla",
    "history": "the Silk Road|+the pyramids of Egypt|the printing press|+Viking ships|the French Revolution"
    "|the Berlin Wall",
    "body and health": "the human heart|+vaccines|a good night's sleep|+allergies|the sense of smell",
    "nature": "photosynthesis|+coral reefs|the Amazon river|+volcanoes|the life cycle of a butterfly|+oak trees",
    "technology": "the electric car|+barcodes|the Python language|+bicycles|the steam engine|machine translation",
    "arts": "the violin|+Shakespeare's sonnets|watercolour painting|+folk dances|jazz|the Mona Lisa",
    "society": "compound interest|+public libraries|the right to vote|+trade unions|recycling|the rental contract",
    "sport and play": "the offside rule|+chess openings|the marathon|+card games|the art of juggling|rock climbing",
    "language": "+irregular verbs|the semicolon|+proverbs|sign language|the alphabet|+crossword puzzles",
    "home": "+houseplants|the washing machine|+woollen jumpers|+wooden chairs|a tidy desk|+leaking taps",
    "astronomy": "+black holes|the planet Mars|+solar eclipses|the Hubble Space Telescope|+the phases of the Moon",
    "transport": "+trams|+double-decker buses|+ferries|+motorways|the Suez Canal|the Tokyo subway",
    "near misses": "cloud computing|+lightning talks|the snow leopard|+brainstorms|+wind instruments|Snow White"
    "|+shower curtains|+hair dryers|the film Frozen|+blood pressure cuffs|the Stormtroopers in Star Wars"
    "|+sunglasses|the Golden State Warriors and their hot streak|+political climates|the thermostat of the heating"
    "|the ice cream van|tyre pressure|+icebreakers at meetings|the sales forecast|the fever thermometer",
}
# For PEOPLE_TEMPLATES, for training only.
PEOPLE = {
    "people": "my neighbour|our new colleague|my twin sister|the football coach|my old piano teacher|a retired nurse"
    "|the dentist|my uncle Harry|the baker around the corner|our landlord|my best friend|the head of the school"
    "|a tired student|my little nephew|the village choir|our customer Ms Lopez|a shy accountant|the swimming club"
    "|my boss|the author of my favourite novel|grandfather|the couple next door|a lawyer in Boston|our postman",
}
