// Filters of the gallery, and its pictures and sounds, which are made when they are first shown. The page reads without this script.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const clips = JSON.parse(byId("clips").textContent);
  const form = byId("filter");
  const direction = byId("filter-direction");
  const text = byId("filter-text");
  const plain = (words) => words.normalize("NFKC").toLowerCase();
  const groups = [...document.querySelectorAll(".group")].map((element) => ({
    element,
    direction: element.dataset.direction,
    cards: [...element.querySelectorAll(".card")].map((card) => ({ card, kind: card.dataset.kind, words: plain(card.textContent) })),
  }));

  function fill(card) {
    for (const place of card.querySelectorAll(".clip:empty")) {
      const clip = clips[place.dataset.clip];
      if (clip.image) {
        const image = document.createElement("img");
        image.src = clip.image;
        image.alt = `Frames of ${place.dataset.name}`;
        place.append(image);
      }
      if (clip.sound) {
        const sound = document.createElement("audio");
        sound.controls = true;
        sound.preload = "metadata";
        sound.src = clip.sound;
        sound.setAttribute("aria-label", `Sound of ${place.dataset.name}`);
        place.append(sound);
      }
    }
  }

  function show() {
    const kind = form.elements.kind.value;
    const words = plain(text.value.trim());
    let shown = 0;
    let all = 0;
    for (const group of groups) {
      let here = 0;
      for (const { card, kind: its, words: mine } of group.cards) {
        const fits = (!direction.value || group.direction === direction.value) && (!kind || its === kind) && mine.includes(words);
        card.hidden = !fits;
        if (fits) fill(card);
        else for (const sound of card.querySelectorAll("audio")) sound.pause();
        here += fits;
        all += 1;
      }
      group.element.hidden = !here;
      shown += here;
    }
    byId("filter-count").textContent = `${shown} of ${all} queries`;
    byId("nothing").hidden = shown > 0;
  }

  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  for (const link of document.querySelectorAll("a[data-show]")) {
    link.addEventListener("click", () => {
      form.reset();
      direction.value = link.dataset.show;
      setTimeout(show);
      byId("gallery").focus({ preventScroll: true });
    });
  }
  // One sound at a time.
  document.addEventListener("play", (event) => {
    for (const sound of document.querySelectorAll("audio")) if (sound !== event.target) sound.pause();
  }, true);
  form.hidden = false;
  show();
})();
