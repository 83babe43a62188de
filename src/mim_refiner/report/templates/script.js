"use strict";
// Only pointing and keys on the maps: the page says everything without this.
document.documentElement.classList.add("js");
const card = document.getElementById("hover");
for (const article of document.querySelectorAll("main > article")) {
  const store = document.getElementById(article.id + "-thumbs");
  if (!store) continue;
  const thumbs = JSON.parse(store.textContent);
  const maps = [...article.querySelectorAll(".map svg")];
  const dots = maps.map((map) => [...map.querySelectorAll("circle")]);
  let shown = -1;
  const hide = () => {
    if (shown >= 0) for (const list of dots) list[shown].classList.remove("here");
    shown = -1;
    card.hidden = true;
  };
  const show = (index, map) => {
    hide();
    shown = index;
    for (const list of dots) {
      list[index].classList.add("here");
      list[index].parentNode.appendChild(list[index]); // drawn last, on top
    }
    const thumb = document.createElement("span");
    thumb.className = "thumb";
    thumb.style.setProperty("--c", thumbs[index].column);
    thumb.style.setProperty("--r", thumbs[index].row);
    const sheet = article.querySelector(".thumb");
    if (sheet) {
      const look = getComputedStyle(sheet);
      const columns = parseFloat(look.backgroundSize) / parseFloat(look.width);
      const rows = parseFloat(look.backgroundSize.split(" ")[1]) / parseFloat(look.width);
      thumb.style.backgroundImage = look.backgroundImage;
      thumb.style.backgroundSize = `calc(var(--t) * ${columns}) calc(var(--t) * ${rows})`;
    }
    const text = document.createElement("span");
    text.textContent = thumbs[index].alt;
    card.replaceChildren(thumb, text);
    card.hidden = false;
    const place = dots[maps.indexOf(map)][index].getBoundingClientRect();
    const left = Math.min(place.right + 12, window.innerWidth - card.offsetWidth - 8);
    const top = Math.min(place.bottom + 12, window.innerHeight - card.offsetHeight - 8);
    card.style.left = Math.max(8, left) + "px";
    card.style.top = Math.max(8, top) + "px";
  };
  for (const map of maps) {
    map.addEventListener("pointermove", (event) => {
      const index = event.target.dataset.i;
      if (index === undefined) hide();
      else if (Number(index) !== shown) show(Number(index), map);
    });
    map.addEventListener("pointerleave", hide);
    map.addEventListener("blur", hide);
    map.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!move) return;
      event.preventDefault();
      show((shown + move + thumbs.length) % thumbs.length, map);
    });
  }
  for (const button of article.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const alone = button.getAttribute("aria-pressed") !== "true";
      for (const other of article.querySelectorAll(".legend button"))
        other.setAttribute("aria-pressed", String(alone && other === button));
      for (const list of dots)
        for (const dot of list) dot.classList.toggle("dim", alone && dot.dataset.k !== button.dataset.class);
    });
  }
}
