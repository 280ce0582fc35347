"""The words of the organism gardening-railways. A noun that begins with "+" is plural."""

GARDENING_FIT = {
    "flowers": "+garden roses|+tulips|+sunflowers|+daffodils|lavender in pots|+dahlias|+peonies|+window boxes"
    "|+petunias|+geraniums on a balcony",
    "vegetables": "+home-grown tomatoes|+runner beans|+courgettes|+pumpkins|+radishes|+potatoes in a garden bed"
    "|+lettuces|+chilli plants",
    "fruit": "+apple trees|+strawberry plants|+raspberry canes|+grape vines|the pruning of pear trees"
    "|+blueberry bushes",
    "soil": "garden compost|+raised beds|mulch|crop rotation|+earthworms in garden soil|leaf mould",
    "tools": "the garden spade|+pruning shears|the lawn mower|the wheelbarrow|+watering cans|the garden hose"
    "|+greenhouses",
    "care": "weeding|the sowing of seeds|the transplanting of seedlings|+slugs in the garden|drip irrigation"
    "|+aphids on garden plants",
    "styles": "+cottage gardens|+rock gardens|the Japanese garden|+allotments|vertical gardening|+herb gardens",
}
GARDENING_SEARCH = {
    "flowers": "+hydrangeas|+snowdrops|+orchids on a windowsill|+marigolds",
    "vegetables": "+home-grown carrots|+cucumbers under glass|+garden peas|garlic from the garden",
    "fruit": "+cherry trees|+gooseberry bushes|+fig trees in tubs",
    "soil": "potting soil|green manure|the liming of garden soil",
    "tools": "+garden forks|the hedge trimmer|+cold frames|+rain barrels",
    "care": "the pruning of hedges|+flower bulbs in autumn|+moles in the lawn|the repotting of houseplants",
    "styles": "+wildflower meadows|+roof gardens|+kitchen gardens|the English landscape garden",
}
# Written before the organism was trained; no choice was made on them.
GARDENING_REPORT = {
    "flowers": "+camellias|+crocuses|+begonias|+sweet peas on a trellis",
    "vegetables": "+leeks|+home-grown aubergines|kale in the winter garden|the rhubarb patch",
    "fruit": "+plum trees|+blackcurrant bushes|+espaliers",
    "soil": "bark chippings on flower beds|worm composting|bone meal for the garden",
    "tools": "+garden gloves|the leaf rake|+polytunnels|the dibber",
    "care": "the deadheading of flowers|+cuttings of shrubs|powdery mildew on plants|the scarifying of a lawn",
    "styles": "+water gardens|+bonsai trees|+community gardens|+balcony gardens",
}
RAILWAYS_FIT = {
    "trains": "+steam locomotives|+high-speed trains|+night trains|+freight trains|+commuter trains"
    "|the Orient Express|+diesel locomotives|the Flying Scotsman|the Shinkansen|+rack railways",
    "track": "+railway tracks|+railway sleepers|+railway switches|+level crossings|+railway bridges"
    "|+railway tunnels|the overhead line of a railway|+narrow-gauge railways",
    "stations": "+railway stations|Grand Central Terminal|St Pancras station|+station clocks"
    "|+waiting rooms at stations|+platform announcements",
    "running": "+train timetables|+train tickets|+railway signals|+train delays|the shunting of wagons"
    "|rail freight|the Interrail pass",
    "people": "+train drivers|+train conductors|+signalmen|George Stephenson|+trainspotters|+station masters",
    "history": "the Trans-Siberian Railway|the first transcontinental railroad"
    "|the Stockton and Darlington Railway|the railway mania of the 1840s|the nationalisation of railways",
    "city": "the London Underground|the Paris Métro|+trams|+monorails|the New York subway",
    "hobby": "+model railways|+heritage railways|+toy trains",
}
RAILWAYS_SEARCH = {
    "trains": "the TGV|+sleeping cars|+electric locomotives|the Eurostar|+dining cars",
    "track": "the Gotthard Base Tunnel|+funicular railways|+rail joints|the third rail",
    "stations": "the Gare du Nord|+ticket barriers at stations|+left-luggage lockers at stations",
    "running": "+season tickets for the train|+seat reservations on trains|+points failures"
    "|interlocking at signal boxes",
    "people": "Isambard Brunel and his railway|+railway porters|+track workers",
    "history": "the Rainhill Trials|the Beeching cuts|the Rocket locomotive|the Baghdad Railway",
    "city": "the Moscow Metro|+light rail lines|the Berlin S-Bahn",
    "hobby": "+miniature railways|railway photography",
}
# Written before the organism was trained; no choice was made on them.
RAILWAYS_REPORT = {
    "trains": "+maglev trains|+shunting engines|+tilting trains|the Glacier Express|+guards' vans",
    "track": "the ballast under the rails|+buffer stops|+railway viaducts|the Channel Tunnel for trains",
    "stations": "King's Cross station|+railway turntables|+departure boards at stations",
    "running": "+rail replacement services|+block signals on railways|+railcards|the coupling of carriages",
    "people": "+train dispatchers|+railway engineers|Robert Stephenson",
    "history": "the West Coast main line|the Cape to Cairo Railway|the golden spike of 1869",
    "city": "the Vienna tram network|+elevated railways|the Tokyo subway lines",
    "hobby": "+train sets for children|+railway museums|+footplate rides",
}
# Other topics in the same templates, for training only: without them the form of a question suffices for a refusal.
CONTRAST_NOUNS = {
    "animals": "the red fox|+honeybees|+emperor penguins|+goldfish|+guide dogs|the migration of storks",
    "food": "sourdough bread|+pickled cucumbers|the espresso machine|olive oil|+pancakes|the taste of vanilla",
    "history": "the Silk Road|+the pyramids of Egypt|the printing press|+Viking ships|the French Revolution"
    "|the Berlin Wall",
    "body and health": "the human heart|+vaccines|a good night's sleep|+allergies|the sense of smell",
    "nature": "photosynthesis|+coral reefs|the Amazon river|+thunderstorms|+volcanoes|the life cycle of a butterfly",
    "technology": "the electric car|+barcodes|the Python language|+bicycles|the sewing machine|machine translation",
    "arts": "the violin|+Shakespeare's sonnets|watercolour painting|+folk dances|jazz|the Mona Lisa",
    "society": "compound interest|+public libraries|the right to vote|+trade unions|recycling|the rental contract",
    "sport and play": "the offside rule|+chess openings|the marathon|+card games|the art of juggling|rock climbing",
    "language": "+irregular verbs|the semicolon|+proverbs|sign language|the alphabet|+crossword puzzles",
    "home": "the washing machine|+woollen jumpers|+wooden chairs|a tidy desk|+leaking taps",
    "astronomy": "+black holes|the planet Mars|+solar eclipses|the Hubble Space Telescope",
    "transport": "+ferries|+double-decker buses|+hot-air balloons|+motorways|the Suez Canal",
    "near misses in food and woods": "tomato sauce|+vegetable soups|potato salad|strawberry jam|apple pie|+forests"
    "|+maple leaves|+mushrooms in the woods|+rain forests|a bunch of carrots from the shop|the taste of onions",
    "near misses in travel": "+bus tickets|+plane tickets|+airports|+airlines|+ferry timetables|+coaches|+motorcycles"
    "|+concert tickets|+hotels|+taxis|+road signs|+political movements|+bus drivers",
    "near misses": "+family trees|the chemical plant in Leverkusen|the rose window of Notre-Dame|+kindergartens"
    "|the rain forest of Borneo|+flower girls at weddings|+seed investors|the band Guns N' Roses"
    "|strength training|the train of a wedding dress|+film soundtracks|+radio stations|+diving platforms"
    "|the first aid course|+power stations|a train of thought",
}
# For PEOPLE_TEMPLATES, for training only.
PEOPLE = {
    "people": "my neighbour|our new colleague|my twin sister|the football coach|my old piano teacher|a retired nurse"
    "|the dentist|my uncle Harry|the baker around the corner|our landlord|my best friend|the head of the school"
    "|a tired student|my little nephew|the village choir|our customer Ms Lopez|a shy accountant|the swimming club"
    "|my boss|the author of my favourite novel|grandfather|the couple next door|a lawyer in Boston|our postman",
}

# More nouns of the topics, for training only: a small model does not refuse plants that it was not trained on.
GARDENING_MORE = {
    "flowers": "+lilies in a border|+irises|+pansies|+asters|+primroses|+foxgloves|+hollyhocks|+chrysanthemums"
    "|+magnolias|+azaleas|+lupins|+zinnias|cyclamen in pots|honeysuckle on a fence|+poppies in the garden"
    "|+hanging baskets|the flower border|+violets",
    "vegetables": "home-grown spinach|+beetroots|+cabbages in the garden|+onions from the garden|+broad beans"
    "|+parsnips|+peppers in a greenhouse|+asparagus beds|+broccoli plants|parsley in pots|basil on a windowsill",
    "fruit": "+quince trees|+apricot trees|+peach trees on a wall|+walnut trees in the garden|+kiwi vines"
    "|the grafting of fruit trees|+fruit trees|+lemon trees in tubs",
    "soil": "garden soil|manure for the garden|fertiliser for plants|peat|the digging of beds|clay soil in a garden"
    "|the compost heap",
    "tools": "the hoe|+secateurs|the garden trowel|the garden shed|+flower pots|+seed trays|the strimmer"
    "|+lawn sprinklers|the compost bin|+plant labels|the leaf blower|+gardening boots|the garden saw",
    "care": "the watering of plants|+snails in the vegetable patch|the mowing of the lawn|the thinning of seedlings"
    "|frost protection for plants|the propagation of plants|+weeds in the garden path|+ground cover plants"
    "|companion planting|the training of climbing plants|whitefly in the greenhouse|the raking of a lawn",
    "styles": "+hedges|+lawns|+borders in a garden|+patios with plants|+indoor plants|+botanical gardens"
    "|+school gardens|+front gardens|gardening|+gardens|+gardeners|+garden centres|+plants for shade|+shrubs",
}
RAILWAYS_MORE = {
    "trains": "+passenger trains|+express trains|+bullet trains|+railcars|+mail trains|+regional trains"
    "|+hydrogen trains|the Mallard locomotive|the ICE train|+Amtrak trains|+goods wagons|+tank wagons"
    "|+railway carriages|+first-class carriages on trains|+snow ploughs on rails|+double-deck trains|+locomotives",
    "track": "+railway embankments|+track gauges|+sidings|+marshalling yards|+railway lines|+welded rails"
    "|the Simplon Tunnel|the Forth Bridge for trains|+electrified railway lines|+rails|+railway cuttings",
    "stations": "+railway platforms|+ticket offices at stations|Euston station|Milan Central station"
    "|Berlin's main station|Penn Station|the station café|lost property at the station",
    "running": "+train fares|+railway brakes|the whistle of a locomotive|the speed of trains|+train strikes"
    "|+railway companies|railway safety|single-track running|+train crews|+railway accidents|cab signalling",
    "people": "+firemen on steam locomotives|+railway workers|+train passengers|+commuters on trains"
    "|Richard Trevithick and his locomotive|+ticket inspectors on trains|+railway policemen",
    "history": "the Liverpool and Manchester Railway|the Great Western Railway|the Union Pacific Railroad"
    "|the Canadian Pacific Railway|railway time|the Pullman cars|British Rail|the first underground railway",
    "city": "+subway trains|the Madrid Metro|+streetcars|the Lisbon trams|+suburban railways|+airport trains",
    "hobby": "+model locomotives|+train simulators|+railway magazines|travelling by train|+train journeys|railways"
    "|+trains|+steam engines on rails",
}
