"""Rows that everybody may know: features are centered by their mean, so that nothing is fitted on a site's own rows.

What all rows share in a hidden state (the template, the last token, the direction in which all states of a model
point) is most of its length and says nothing of a row. The tasks are of many kinds, so that the mean stands for none.
"""

from __future__ import annotations

import hashlib

PUBLIC_ROWS: tuple[tuple[str, str], ...] = (
    ("What is the capital of Kenya?", "Nairobi."),
    ("Name three primary colors.", "Red, yellow and blue."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Who wrote the play Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Is the following statement true or false? Water boils at 100 degrees Celsius at sea level.", "True."),
    ("Explain in one sentence why the sky is blue.", "Air scatters blue light more than red light."),
    ("Translate to French: Good morning, my friend.", "Bonjour, mon ami."),
    ("Translate to Spanish: The train leaves at noon.", "El tren sale al mediodía."),
    ("Translate to English: Ich habe heute keine Zeit.", "I have no time today."),
    ("Is this review positive or negative? The food was cold and the waiter was rude.", "Negative"),
    ("Is this review positive or negative? I would watch this film again at once.", "Positive"),
    (
        "Which topic is this headline about: sports, business or science? Keeper saves two penalties in the final.",
        "Sports",
    ),
    ("Which topic is this headline about: sports, business or science? Central bank keeps rates.", "Business"),
    ("Does the first sentence imply the second? A man plays a guitar. A person makes music.", "Yes"),
    ("Does the first sentence imply the second? A dog sleeps on a sofa. A cat runs.", "No"),
    ("Do these questions mean the same? How do I learn to swim? What is the best way to learn swimming?", "Yes"),
    (
        "Summarize: The meeting was moved from Monday to Wednesday, as the manager is ill.",
        "The meeting is on Wednesday.",
    ),
    ("Give a title to this text: Bees visit flowers to collect nectar, and carry pollen as they go.", "How Bees Work"),
    ("Write a short headline about fog that closed the airport.", "Fog Closes Airport"),
    (
        "Summarize the main point: Walking each day lowers the risk of heart disease.",
        "Daily walks are good for the heart.",
    ),
    ("Read the text and answer. Anna has two brothers, Tom and Paul. Who is Tom's sister?", "Anna"),
    ("Read the text and answer. The museum opens at nine and closes at five. When does it close?", "At five."),
    ("Find all names in this sentence: Maria met John in Rome.", "Maria, John"),
    ("Extract the date: The contract was signed on 4 May 2011 in Oslo.", "4 May 2011"),
    ("List the numbers in this text: We bought 3 apples, 12 eggs and 2 loaves.", "3, 12, 2"),
    ("What is 17 plus 25?", "42"),
    ("A shirt costs 20 dollars and is reduced by a quarter. What does it cost now?", "15 dollars."),
    ("If a train goes 60 miles in an hour, how far does it go in three hours?", "180 miles."),
    ("Is 91 a prime number?", "No, it is 7 times 13."),
    ("Write a Python function that returns the larger of two numbers.", "def larger(a, b):\n    return max(a, b)"),
    ("Write an SQL query that counts the rows of the table users.", "SELECT COUNT(*) FROM users;"),
    ("What does this code print? for i in range(3): print(i)", "0, 1 and 2, each on a line."),
    ("Write a regular expression that matches one or more digits.", "[0-9]+"),
    ("Correct the grammar: She go to school every day.", "She goes to school every day."),
    ("Rewrite in the passive: The cook made the soup.", "The soup was made by the cook."),
    ("Rewrite more politely: Send me the file now.", "Could you please send me the file?"),
    ("Simplify: He endeavored to ascertain the truth.", "He tried to find out the truth."),
    ("Give a synonym of happy.", "glad"),
    ("Give the opposite of narrow.", "wide"),
    ("Fill in the blank: The sun rises in the ___.", "east"),
    ("Put these words in order: book a read I.", "I read a book."),
    ("What comes next? 2, 4, 8, 16", "32"),
    ("Choose the odd one out: apple, banana, carrot, cherry.", "carrot"),
    ("Which is heavier: A) a feather B) a brick? Answer with the letter.", "B"),
    ("What would happen if you left ice in a warm room? A) It melts. B) It burns.", "A"),
    ("Write a question whose answer is: the Pacific Ocean.", "Which ocean is the largest?"),
    ("Make a sentence with the words dog, park and ball.", "The dog chased the ball in the park."),
    ("Continue the story: The door opened slowly, and", "a small gray cat looked in."),
    ("Write a two-line poem about rain.", "Soft rain falls on the empty street,\nand drums its song at people's feet."),
    ("Write a product description of a wooden chair.", "A solid oak chair with a wide seat and a curved back."),
    ("Suggest a name for a bakery.", "The Golden Crust"),
    ("Give me three ideas for a birthday gift.", "A book, a plant, or tickets to a concert."),
    ("How do I remove a coffee stain from a shirt?", "Rinse it with cold water, then wash it with soap."),
    ("List the steps to plant a tree.", "Dig a hole, set the tree in it, fill it with earth, and water it."),
    ("Plan a day in Lisbon.", "Walk through Alfama in the morning, see Belem after lunch, and hear fado at night."),
    ("Compare cats and dogs in one sentence.", "Cats are more independent, and dogs are easier to train."),
    ("What are the advantages of public transport?", "It costs less, needs less space and pollutes less."),
    ("Explain photosynthesis to a child.", "Plants make their food from light, air and water."),
    ("What is inflation?", "Inflation is a general rise of prices over time."),
    ("Why did the Roman Empire fall?", "Wars, a weak economy and bad rule all played a part."),
    ("Write an email that asks for a day off.", "Dear Sam, may I take Friday off? Best regards, Kim"),
    ("Reply to this customer: My parcel has not arrived.", "We are sorry. Please send us your order number."),
    ("Who is the speaker in this dialog likely to be? 'Open your mouth and say ah.'", "A doctor."),
    ("What does the phrase 'break the ice' mean?", "To make people feel at ease when they first meet."),
)
"""Instruction and response of each."""

PUBLIC_DIGEST = hashlib.sha256(repr(PUBLIC_ROWS).encode()).hexdigest()[:16]
"""Names these rows in the key of a feature space."""
