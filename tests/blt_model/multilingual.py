"""Short texts in many scripts: one byte a character to four, with and without spaces, right to left, combining."""

TEXTS = {
    "English": "All rivers run to the sea; yet the sea is not full.",
    "German": "Über die Brücke führt eine schmale Straße zum größten Marktplatz.",
    "French": "L'été dernier, le château était fermé : quelle déception !",
    "Turkish": "Işıklı sokakta çığlık atan küçük kuşu gördük.",
    "Vietnamese": "Trời hôm nay đẹp quá, chúng ta cùng đi dạo nhé.",
    "Greek": "Η θάλασσα είναι ήσυχη σήμερα το πρωί.",
    "Russian": "Поезд отправляется в семь часов, не опоздайте.",
    "Georgian": "მთაზე თოვლი ჯერ კიდევ არ დამდნარა.",
    "Armenian": "Գիրքը սեղանի վրա է, բացիր այն։",
    "Hebrew": "הספר הזה נכתב לפני שנים רבות.",
    "Arabic": "القمر مضيء الليلة فوق المدينة القديمة.",
    "Hindi": "बारिश के बाद मिट्टी की ख़ुशबू आती है।",
    "Tamil": "மழை பெய்தால் நெல் வளரும்.",
    "Thai": "วันนี้อากาศดีมากเราไปเดินเล่นกันเถอะ",
    "Chinese": "山重水复疑无路，柳暗花明又一村。",
    "Japanese": "吾輩は猫である。名前はまだ無い。",
    "Korean": "가을 하늘이 맑고 높습니다.",
    "Amharic": "ሰላም ለሁላችሁም ይሁን።",
    "symbols": "∀ε>0 ∃δ: 👩‍👩‍👧‍👦 🇪🇺 e\u0301 ≠ \u00e9 \u200f\u2028",
}
