"""Calibration text that any machine has: several kinds and languages, the same with this Python."""

# ruff: noqa: RUF001 -- the text below is in many alphabets

import inspect
from importlib import import_module
from typing import Final


def default_texts() -> list[str]:
    """Texts of several kinds and languages that are the same on any machine with this Python."""
    topics = import_module("pydoc_data.topics").topics
    modules = [import_module(name) for name in _MODULES]
    described = [inspect.getdoc(member) for m in modules for member in (m, *vars(m).values())]
    languages = "\n".join(_LANGUAGES)
    return [
        "\n\n".join(topics[key] for key in sorted(topics)),
        "\n\n".join(inspect.getsource(module) for module in modules),
        languages,
        "\n\n".join(dict.fromkeys(text for text in described if text and len(text) > 200)),
        "\n\n".join(_PROSE),
    ]


_MODULES: Final = (
    "argparse",
    "calendar",
    "difflib",
    "heapq",
    "json",
    "random",
    "statistics",
    "textwrap",
)

# Everyday prose in many languages and English of many kinds, because the standard library is all
# English documentation and code.
_LANGUAGES: Final = (
    "The train was late again, so Anna bought a coffee and watched the rain run down the "
    "windows. Her brother had promised to call before noon. When the phone finally rang, it "
    "was not him but a doctor from the hospital in York, who asked whether she could come at "
    "once.",
    "Am nächsten Morgen ging der Großvater früh in den Garten, um die Äpfel zu pflücken, bevor "
    "es zu regnen begann. Die Kinder schliefen noch, und im Haus roch es nach frischem Brot. "
    "Er hatte versprochen, mit ihnen an den See zu fahren, wenn das Wetter besser würde.",
    "Le gouvernement a annoncé mardi que les prix de l'énergie n'augmenteront pas avant l'été. "
    "Selon le ministre, cette décision devrait aider les familles les plus modestes, mais les "
    "syndicats estiment qu'elle ne suffira pas et appellent à une nouvelle journée de grève.",
    "Para preparar la sopa, corte las cebollas y los tomates en trozos pequeños y fríalos con "
    "un poco de aceite. Después añada el caldo, una pizca de sal y dos hojas de laurel, y "
    "déjelo cocer durante media hora. Se sirve caliente, con pan y un vaso de vino.",
    "La città era ancora silenziosa quando Marco aprì la finestra. Dall'altra parte della "
    "piazza una donna vendeva fiori, come ogni domenica, e il profumo arrivava fino al terzo "
    "piano.",
    "O time venceu por dois a um depois de sofrer um gol logo no primeiro minuto. O treinador "
    "disse que os jogadores mereciam a vitória, mas que ainda precisam melhorar na defesa.",
    "De winkel is op zaterdag tot zes uur open. Wie een fiets wil huren, moet een geldig "
    "paspoort meenemen en vijftig euro borg betalen. Vergeet niet om uw helm terug te brengen.",
    "Dzień dobry, chciałbym zapytać, o której godzinie odjeżdża ostatni autobus do Krakowa i "
    "czy muszę kupić bilet wcześniej. Dziękuję bardzo za pomoc.",
    "Когда Иван вернулся домой, в комнате горел свет, а на столе лежало письмо от его сестры. "
    "Она писала, что зима в этом году холодная, но что у детей всё хорошо и они ждут его в "
    "марте.",
    "科学家在南方的山区发现了一种新的植物。研究人员说,这种植物只在夏天开花,数量很少,因此需要保"
    "护。当地的学校也会组织学生去参观,让他们了解自然的重要性。",
    "昨日は友達と一緒に京都へ行きました。朝は少し寒かったですが、午後は天気がよくなって、古いお"
    "寺や庭をゆっくり見ることができました。来年の春にもう一度行きたいと思います。",
    "오늘 회의는 오후 세 시에 시작합니다. 모든 직원은 보고서를 준비해 주시기 바라며, 질문이 "
    "있으면 담당자에게 전화해 주십시오.",
    "ذهب الطبيب إلى القرية الصغيرة لكي يزور المرضى، وكان الناس ينتظرونه أمام المدرسة منذ "
    "الصباح الباكر.",
    "मेरी माँ हर सुबह पाँच बजे उठती है और परिवार के लिए चाय बनाती है। उसके बाद वह बाज़ार जाती है।",
    "Yarın hava güneşli olacak, bu yüzden çocuklarla birlikte denize gitmeyi düşünüyoruz. "
    "Akşam yemeğini sahildeki küçük lokantada yiyeceğiz.",
    "Chiều nay trời mưa to nên chúng tôi ở nhà, nấu cơm và kể cho nhau nghe những câu chuyện "
    "ngày xưa.",
)

_PROSE: Final = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the boat came in. He "
    "stood at the top of the steps with his hands in his coat and watched the two men tie her "
    "up, badly, the way men do who learned it from a book. The younger one waved. Nobody had "
    "told them, then, what had happened in the winter, or they would not have come so gladly.",
    '"You never said you had a sister," said Margaret.\n"You never asked." He set the cup down '
    "and looked out at the wet garden. \"She lives in Leeds. We don't talk about money, so we "
    'hardly talk at all."\n"And your mother?"\n"My mother," he said slowly, "would like you to '
    'come on Sunday. I told her you were busy."',
    "Once upon a time there lived a miller who had three daughters and one blind horse. In the "
    "seventh year of the great drought, when the river was no deeper than a bowl, the king's "
    'messenger came to the mill and asked for the horse. "Take the mill instead," said the '
    'youngest, "for the horse knows the way to the water, and the mill does not."',
    "My friends, we did not come to this square because it was easy. We came because our fathers "
    "and mothers were told to wait, and they waited, and they were told to wait again. Let it "
    "not be said of us that we knew what was right and were too tired to do it. Give me your "
    "hands and your patience, and before the snow falls there shall be bread in every house.",
    "O little road that leads away from home,\nhow often have I cursed your stones and dust,\n"
    "and yet whenever I have ceased to roam\nit was your turning that I came to trust.\nThe oak "
    "is down, the well is green with moss,\nthe neighbours' names are strange upon the door;\nwe "
    "count our days by what we learn to cross,\nand come to count the same ones as before.",
    "Shares in the company fell nine percent on Thursday after it warned that profits for the "
    "year would be well below expectations. The chief executive blamed higher wages and the "
    "strong dollar, and said that up to 400 jobs in Ohio and Kentucky were at risk. Analysts had "
    "been forecasting earnings of $1.20 a share. A union spokeswoman called the plan reckless.",
    "Bats find their way in the dark by listening to the echoes of their own calls, which are "
    "far too high for us to hear. A moth that some of them hunt has learned to answer: it clicks "
    "back, and the bat, confused or warned, turns away. Whether the noise jams the echo or only "
    "advertises that the moth tastes foul has been argued about for fifty years.",
    "In 1346 the king crossed the Channel with some ten thousand men, many of them archers from "
    "Wales. The French army that met him was larger and better armed, but it attacked late in "
    "the day, uphill, after a storm. By nightfall the greater part of its knights lay dead, and "
    "what had seemed the strongest kingdom in Europe no longer had a road it could defend.",
    "This agreement is made between the landlord and the tenant named below. The tenant shall "
    "pay the rent on the first day of each month, without deduction, and shall not assign or "
    "sublet the premises without the prior written consent of the landlord, which consent shall "
    "not be unreasonably withheld. Either party may terminate this agreement by giving not less "
    "than two months' notice in writing.",
    "Take one tablet twice a day with food. Do not take more than four tablets in 24 hours. If "
    "you are pregnant, have kidney disease or are taking medicine to thin your blood, ask your "
    "doctor before using this product. Stop and get help at once if your face or throat swells, "
    "or if you have trouble breathing. Keep out of the reach of children.",
    "Melt the butter in a heavy pan over a low heat, then add the flour and stir for two minutes "
    "until it smells of biscuits. Pour in the warm milk a little at a time, whisking well. "
    "Season with salt, white pepper and a scrape of nutmeg. If there are lumps, push the sauce "
    "through a sieve; nobody will know. Serves 4, or 2 hungry teenagers.",
    "Great hotel, terrible parking! We stayed three nights in March with our two kids. The room "
    "was spotless and the staff could not have been nicer, especially Carlos at the front desk. "
    "BUT there are only 12 spaces and they charge $35 a day. Breakfast was ok, the eggs were "
    "cold lol. Would stay again if I come by train. 4/5",
    "Q: My tomato leaves are turning yellow from the bottom up. Am I watering too much?\nA: "
    "Could be, but check the spots first. Brown rings like a target mean early blight. Cut off "
    "the sick leaves, mulch with straw, and water the soil, not the plant. If there are no "
    "spots, they are just hungry: feed them every two weeks once the first fruit has set.",
    "Hi Tom,\n\nSorry for the slow reply, I was off sick. The figures you sent look fine to me, "
    "except that the second table still has last year's prices. Could you send a new version by "
    "Wednesday? Also, are you coming to Priya's leaving drinks? I said I'd book a table for ten "
    "or so.\n\nBest,\nHelen",
    "14 September. Rain again. The goats have eaten the last of the beans and look pleased with "
    "themselves. I walked to the village for lamp oil and met the schoolmaster, who says that "
    "the bridge will not be mended before spring. He lent me a book about the stars. I have read "
    "forty pages and already the sky seems less friendly than it was.",
    "A train leaves the station at 9:15 and travels at 80 miles per hour. A second train leaves "
    "the same station at 10:00 and travels in the same direction at 110 miles per hour. How long "
    "does it take to catch up? When the second train starts, the first is 0.75 x 80 = 60 miles "
    "ahead. It gains 110 - 80 = 30 miles each hour, so it needs 60 / 30 = 2 hours, and catches up "
    "at noon.",
    "What do we mean when we say that a man was free to do otherwise? Not, surely, that nothing "
    "made him do it; for then it would not have been his deed at all, but an accident that befell "
    "him. We mean that if he had wished it he would have done another thing. And to the question "
    "whether he could have wished it, perhaps there is no answer that is not the same again.",
    "Rovers came from behind to beat United 3-2 on a freezing night in front of 21,000. Okafor "
    "headed the first after six minutes, but the visitors were level before half time through a "
    "penalty that their manager later admitted was generous. With two minutes left and the crowd "
    "already leaving, Byrne struck from thirty yards and the ball went in off the post.",
    "The word comes from the Latin for a small key. It is a long, slender bone that lies almost "
    "flat above the first rib and holds the shoulder away from the chest, so that the arm swings "
    "freely. It is the first bone in the body to begin to harden before birth and one of the "
    "last to finish, at about the age of twenty-five. It is also among those most often broken.",
    "MRS. HALE. And where is my husband?\nBUTLER. In the library, madam, with the gentleman from "
    "the bank.\nMRS. HALE. Is he shouting?\nBUTLER. No, madam.\nMRS. HALE. Then it is worse than I "
    "thought. (She sits. A clock strikes. From the next room comes the sound of a chair being "
    "overturned, and then of two men laughing.)",
    "sam: did you feed the cat\njo: I thought it was your turn??\nsam: it's ALWAYS my turn. he "
    "is sitting on my laptop looking like a tax inspector\njo: there's half a can of tuna in the "
    "fridge, second shelf, behind the thing\nsam: what thing\njo: the green thing. don't open it. "
    "home by 8, love you x",
    "Why you should never trust an average: if nine people in a room earn $30,000 and the tenth "
    "earns $3 million, the average income is more than $300,000, and it describes no one. The "
    "median, the person in the middle, would have told you what you wanted to know. The lesson "
    "isn't that averages lie. It's that they answer a question you may not have asked.",
    "Wanted: night baker, full time, small family shop near the harbor. Experience with sourdough "
    "helpful but not required; we will teach the right person. You must be able to lift 50 lb "
    "and to be cheerful at four in the morning, or at least quiet. $19 an hour, health plan "
    "after 90 days, all the bread you can eat. Ask for Rosa.",
    "From the station, cross the river by the iron bridge and turn left along the old city wall. "
    "The climb to the castle takes about twenty minutes and is steep in places, but the view "
    "over the roofs to the mountains is worth every step. Go early: by ten the tour buses have "
    "arrived. The small museum in the gatehouse (closed Mondays) has a fine collection of clocks.",
    "It was, as these things go, a quiet revolution. No one stormed the palace; the palace had "
    "been a car park since 1970. The ministers simply stopped coming to work, one after another, "
    "and when at last the telephone rang in the prime minister's office it was answered by the "
    "cleaner, Mrs. Abebe, who governed the country very well until Thursday.",
    "INTERVIEWER: You've said that you hated your first record.\nSINGER: Hated? I couldn't be in "
    "the same room with it. We made it in four days, we were twenty, somebody's uncle was paying. "
    "You can hear that we're scared.\nINTERVIEWER: People love it.\nSINGER: I know. Well, people "
    "like to hear that you're scared. It took me thirty years to understand that.",
    "The committee met at 7 p.m. with nine members present. The minutes of the last meeting were "
    "approved. Mr. Osei reported that the roof repairs would cost £4,200, of which £3,000 has "
    "been raised. It was agreed to hold a jumble sale on May 6th. Mrs. Lindqvist asked that her "
    "objection to the new locks be recorded. There being no other business, the meeting closed.",
    "Light travels so fast that for most of history it was thought to need no time at all. In "
    "1676 a Danish astronomer noticed that the moons of Jupiter were late. Their eclipses came "
    "some minutes after the tables said they should when the Earth was on the far side of its "
    "orbit, and early when it was near. He concluded, rightly, that the news had further to go.",
    "She has the kind of voice that makes you check whether you have locked the door. In this "
    "slow, beautiful, slightly too long film she plays a widow who rents a room to a man she "
    "believes has killed her son. Nothing much happens, and you will not be able to look away. "
    "The last ten minutes are a mistake; leave when the dog does.",
    "Don't worry if the first row looks loose, it tightens up as you go. Knit two, purl two to "
    "the end, then turn. When the piece measures 14 inches, change to the smaller needles and "
    "decrease one stitch at each end of every other row until 38 remain. Cast off loosely. If "
    "you have dropped a stitch, a crochet hook is your best friend.",
)
