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

# Everyday prose, because the standard library is all English documentation and code.
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
